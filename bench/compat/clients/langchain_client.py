"""langchain-openai."""

from attempt import MODEL, URL, attempt, content
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(model=MODEL, base_url=URL, api_key="none")
messages = [HumanMessage(content=content())]

attempt("picture", lambda: chat.invoke(messages).content)
attempt("stream", lambda: "".join(chunk.content for chunk in chat.stream(messages)))
