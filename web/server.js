// Requests to our routes, and what is said when one fails.

import { say } from "./translation.js";

/** The JSON of an answer. Throws the server's message, or one of the page's own, with `status`. */
export async function askServer(api, path, options = {}) {
  let response;
  try {
    response = await api.fetchApi(path, { cache: "no-store", ...options });
  } catch {
    throw new Error(say("server.silent"));
  }
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  const { status } = response;
  throw Object.assign(new Error(answer?.error ?? say("server.refused", { status })), { status });
}
