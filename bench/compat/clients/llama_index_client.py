"""llama-index-llms-openai-like."""

from attempt import MODEL, PICTURE, QUESTION, URL, attempt
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=True)
messages = [ChatMessage(role="user", blocks=[TextBlock(text=QUESTION), ImageBlock(image=PICTURE)])]

attempt("picture", lambda: llm.chat(messages).message.content)
attempt("stream", lambda: "".join(chunk.delta or "" for chunk in llm.stream_chat(messages)))
