// Vercel's AI SDK: it checks every chunk against a schema and refuses what does not fit.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, streamText, tool } from "ai";
import assert from "node:assert/strict";
import { test } from "node:test";
import { z } from "zod";

const { HOTNEURON_URL: baseURL, HOTNEURON_KEY: apiKey, HOTNEURON_MODEL: name } = process.env;
const provider = createOpenAICompatible({
  name: "hotneuron",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(name);
const prompt = "What is the capital of France?";
const greedy = { model, prompt, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

test("chat, stream and usage", async () => {
  const whole = await generateText(greedy);
  assert.match(whole.text, /Paris/);
  const stream = streamText(greedy);
  let streamed = "";
  for await (const part of stream.textStream) streamed += part;
  assert.equal(streamed, whole.text);
  assert.equal(await stream.finishReason, whole.finishReason);
  const usage = await stream.usage;
  assert(usage.outputTokens > 0);
  assert.equal(usage.outputTokens, whole.usage.outputTokens);
  assert.equal(usage.inputTokens, whole.usage.inputTokens);
});

test("stop and seed", async () => {
  const stopped = await generateText({ ...greedy, stopSequences: [" Paris"] });
  assert.doesNotMatch(stopped.text, /Paris/);
  assert.equal(stopped.finishReason, "stop");
  const sampled = { ...greedy, temperature: 1.5, seed: 7 };
  assert.equal((await generateText(sampled)).text, (await generateText(sampled)).text);
});

test("plain completion", async () => {
  const completion = await generateText({
    ...greedy,
    model: provider.completionModel(name),
    prompt: "The capital of France is",
  });
  assert(completion.text.length > 0);
});

test("errors are told apart", async () => {
  const refused = (change) => (error) => {
    assert(APICallError.isInstance(error));
    assert.equal(error.statusCode, change.status);
    return error.data.error.code === change.code;
  };
  await assert.rejects(
    generateText({ ...greedy, model: provider("gpt-4") }),
    refused({ status: 404, code: "model_not_found" }),
  );
  await assert.rejects(
    generateText({ ...greedy, prompt: "word ".repeat(20_000) }),
    refused({ status: 400, code: "context_length_exceeded" }),
  );
  const stranger = createOpenAICompatible({ name: "stranger", baseURL, apiKey: "wrong" });
  await assert.rejects(
    generateText({ ...greedy, model: stranger(name) }),
    refused({ status: 401, code: "invalid_api_key" }),
  );
});

const verdict = z.object({
  city: z.enum(["Paris", "London", "Rome"]),
  isCapital: z.boolean(),
});

test("structured output, whole and streamed", async () => {
  const asked = { ...greedy, maxOutputTokens: 60, output: Output.object({ schema: verdict }) };
  const whole = await generateText(asked);
  assert.equal(typeof whole.output.isCapital, "boolean");
  const stream = streamText(asked);
  const parts = [];
  for await (const part of stream.partialOutputStream) parts.push(part);
  assert.deepEqual(await stream.output, whole.output);
  assert(parts.length > 0);
});

const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.enum(["Paris", "London", "Rome"]) }),
  execute: async ({ city }) => `18 degrees and sunny in ${city}`,
});

test("tools, whole and streamed", async () => {
  const asked = {
    ...greedy,
    maxOutputTokens: 80,
    prompt: "What is the weather in Paris?",
    tools: { weather },
    toolChoice: { type: "tool", toolName: "weather" },
  };
  const whole = await generateText(asked);
  assert.equal(whole.finishReason, "tool-calls");
  const [call] = whole.toolCalls;
  assert.equal(call.toolName, "weather");
  assert.match(whole.toolResults[0].output, /sunny in/);
  const stream = streamText(asked);
  let deltas = 0;
  for await (const part of stream.fullStream) {
    assert.notEqual(part.type, "error", part.error);
    if (part.type === "tool-input-delta") deltas += 1;
  }
  assert(deltas > 1, "the arguments came in one piece");
  assert.deepEqual((await stream.toolCalls)[0].input, call.input);
});
