"""pydantic-ai."""

from attempt import MODEL, PICTURE, QUESTION, URL, attempt
from pydantic_ai import Agent, BinaryContent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none")))

attempt("picture", lambda: agent.run_sync([QUESTION, BinaryContent(PICTURE, media_type="image/png")]).output)
