"""smolagents."""

from attempt import MODEL, URL, attempt, content
from smolagents import OpenAIModel
from smolagents.models import ChatMessage

model = OpenAIModel(model_id=MODEL, api_base=URL, api_key="none")

attempt("picture", lambda: model.generate([ChatMessage(role="user", content=content())]).content)
