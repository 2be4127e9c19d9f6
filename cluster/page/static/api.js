// Requests to the server. A refusal and a server that is away are told apart: the second is tried again.

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export class Away extends Error {}

const WAIT_MS = 20_000;

export async function ask(method, path, body, options = {}) {
  let answer;
  try {
    answer = await fetch(`api/${path}`, {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(WAIT_MS),
      ...options,
    });
  } catch (error) {
    throw new Away(String(error));
  }
  if (answer.status >= 500) throw new Away(`status ${answer.status}`);
  if (answer.status === 401) location.reload(); // the page for signing in is there
  if (!answer.ok) throw new Refused(answer.status, (await told(answer)).detail ?? `status ${answer.status}`);
  return answer.status === 204 ? null : answer.json();
}

async function told(answer) {
  try { return await answer.json(); } catch { return {}; }
}

export const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

// Asks until there is an answer; `whileAway` is told of each failure.
export async function askUntilThere(method, path, body, whileAway) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      return await ask(method, path, body);
    } catch (error) {
      if (!(error instanceof Away)) throw error;
      whileAway();
      await pause(wait);
    }
  }
}
