// The AI SDK (packages ai and @ai-sdk/openai-compatible).
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { attempt, model, picture, question, url } from "./attempt.mjs";

const provider = createOpenAICompatible({ name: "foveate", baseURL: url });
const asked = {
  model: provider(model),
  messages: [
    { role: "user", content: [{ type: "text", text: question }, { type: "image", image: picture }] },
  ],
};

await attempt("picture", async () => (await generateText(asked)).text);
await attempt("stream", async () => await streamText(asked).text);
