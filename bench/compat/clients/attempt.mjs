// What every client script in JavaScript shares; see attempt.py.
import { readFileSync } from "node:fs";

export const url = process.env.COMPAT_URL + "/v1";
export const model = process.env.COMPAT_MODEL;
export const picture = readFileSync(process.env.COMPAT_PICTURE);
export const question = process.env.COMPAT_QUESTION;
export const content = [
  { type: "text", text: question },
  { type: "image_url", image_url: { url: process.env.COMPAT_DATA_URL } },
];

export async function attempt(name, ask) {
  let said;
  try {
    said = await ask();
  } catch (error) {
    said = String(error);
  }
  const ok = said.trim() === process.env.COMPAT_ANSWER;
  console.log(JSON.stringify({ attempt: name, ok, said: said.slice(0, 300) }));
}
