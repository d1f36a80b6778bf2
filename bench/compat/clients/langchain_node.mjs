// @langchain/openai.
import { HumanMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";
import { attempt, content, model, url } from "./attempt.mjs";

const chat = new ChatOpenAI({ model, apiKey: "none", configuration: { baseURL: url } });
const messages = [new HumanMessage({ content })];

await attempt("picture", async () => (await chat.invoke(messages)).content);
await attempt("stream", async () => {
  let said = "";
  for await (const chunk of await chat.stream(messages)) said += chunk.content;
  return said;
});
