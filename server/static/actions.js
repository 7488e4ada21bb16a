// What the reader can start from the page: a measurement, and one question in two modes.
const POST = { method: "POST", headers: { "Content-Type": "application/json", "X-Hotneuron-Page": "1" } };

async function post(path, body, signal) {
  const reply = await fetch(path, { ...POST, body: JSON.stringify(body), signal });
  if (reply.ok) return reply;
  const error = (await reply.json().catch(() => null))?.error;
  throw new Error(error?.message || "the server answered with status " + reply.status);
}

export function setUpBenchmark() {
  const form = document.getElementById("benchmark");
  const problem = document.getElementById("benchmark-error");
  form.hidden = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    problem.hidden = true;
    try {
      await post("/dashboard/benchmark", { batch: Number(form.elements.batch.value) });
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  });
}

async function* chunks(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

class Answer {
  constructor(article) {
    this.mode = article.querySelector("select");
    this.box = article.querySelector(".answer-text");
    this.speed = article.querySelector(".answer-speed");
    this.note = article.querySelector(".answer-note");
    this.clear();
  }

  clear() {
    this.text = "";
    this.tokensPerSecond = null;
    this.box.textContent = this.speed.textContent = this.note.textContent = "";
  }

  async ask(question, maxTokens, signal) {
    const body = {
      messages: [{ role: "user", content: question }], max_tokens: maxTokens, temperature: 0,
      stream: true, stream_options: { include_usage: true }, sparsity: { mode: this.mode.value },
    };
    const start = performance.now();
    let first = null, last = null, usage = null, reason = null;
    this.note.textContent = "asking";
    const reply = await post("/v1/chat/completions", body, signal);
    for await (const chunk of chunks(reply)) {
      usage = chunk.usage || usage;
      const choice = chunk.choices[0];
      reason = choice?.finish_reason || reason;
      const piece = choice?.delta.content;
      if (!piece) continue;
      last = performance.now();
      first ??= last;
      this.text += piece;
      this.box.textContent = this.text;
    }
    this.tell(usage?.completion_tokens ?? 0, start, first, last, reason);
  }

  tell(tokens, start, first, last, reason) {
    if (tokens > 1 && last > first) {
      this.tokensPerSecond = (tokens - 1) / ((last - first) / 1000);
      this.speed.textContent = this.tokensPerSecond.toFixed(1) + " tokens/s";
    }
    const wait = first === null ? "" : ", first after " + (first - start).toFixed(0) + " ms";
    this.note.textContent = tokens + " tokens" + wait + "; ended by " + reason + "; measured in this browser";
  }
}

function verdict(answers) {
  const [one, other] = answers;
  if (!other) return "";
  const parts = [];
  if (one.tokensPerSecond && other.tokensPerSecond) {
    parts.push((one.tokensPerSecond / other.tokensPerSecond).toFixed(2) + "× as fast");
  }
  let same = 0;
  while (same < one.text.length && one.text[same] === other.text[same]) same += 1;
  const isSame = one.text === other.text;
  parts.push(isSame ? "the same answer" : "the same for " + same + " characters");
  return parts.join(", ");
}

export function setUpChat() {
  const form = document.getElementById("chat-form");
  const stop = document.getElementById("chat-stop");
  const ask = form.querySelector('button[type="submit"]');
  const result = document.getElementById("chat-verdict");
  const answers = [...document.querySelectorAll(".answer")].map((article) => new Answer(article));
  let running = null;
  document.getElementById("chat").hidden = false;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running = new AbortController();
    [ask.disabled, stop.disabled] = [true, false];
    result.textContent = "";
    answers.forEach((answer) => answer.clear());
    try {
      for (const answer of answers) {
        await answer.ask(form.elements.question.value, Number(form.elements.max_tokens.value), running.signal);
      }
      result.textContent = verdict(answers);
    } catch (error) {
      result.textContent = error.name === "AbortError" ? "stopped" : error.message;
    }
    [ask.disabled, stop.disabled] = [false, true];
  });
  stop.addEventListener("click", () => running?.abort());
}
