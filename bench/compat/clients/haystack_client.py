"""haystack-ai."""

import base64

from attempt import MODEL, PICTURE, QUESTION, URL, attempt
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.utils import Secret

generator = OpenAIChatGenerator(model=MODEL, api_base_url=URL, api_key=Secret.from_token("none"))
image = ImageContent(base64_image=base64.b64encode(PICTURE).decode(), mime_type="image/png")
messages = [ChatMessage.from_user(content_parts=[QUESTION, image])]

attempt("picture", lambda: generator.run(messages)["replies"][0].text)
