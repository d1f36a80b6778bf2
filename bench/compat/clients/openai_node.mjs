// openai for Node.js.
import OpenAI from "openai";
import { attempt, content, model, url } from "./attempt.mjs";

const client = new OpenAI({ baseURL: url, apiKey: "none" });
const messages = [{ role: "user", content }];

await attempt("picture", async () => {
  const reply = await client.chat.completions.create({ model, messages });
  return reply.choices[0].message.content;
});
await attempt("stream", async () => {
  let said = "";
  for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
    said += chunk.choices[0]?.delta?.content ?? "";
  }
  return said;
});
