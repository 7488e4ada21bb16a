// The official JavaScript package.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const { HOTNEURON_URL: baseURL, HOTNEURON_KEY: apiKey, HOTNEURON_MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, messages, temperature: 0, max_tokens: 24 };

test("models", async () => {
  const names = [];
  for await (const found of client.models.list()) names.push(found.id);
  assert.deepEqual(names, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("chat, stream and usage", async () => {
  const whole = await client.chat.completions.create(greedy);
  const text = whole.choices[0].message.content;
  assert.match(text, /Paris/);
  const stream = client.chat.completions.stream({
    ...greedy,
    stream_options: { include_usage: true },
  });
  let streamed = "";
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta.content ?? "";
  assert.equal(streamed, text);
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
  assert.equal(final.usage.total_tokens, whole.usage.total_tokens);
});

test("n, seed, stop and logprobs", async () => {
  const sampled = { ...greedy, temperature: 1.5, n: 2, seed: 3 };
  const [first, again] = await Promise.all([
    client.chat.completions.create(sampled),
    client.chat.completions.create(sampled),
  ]);
  const texts = (reply) => reply.choices.map((choice) => choice.message.content);
  assert.equal(first.choices.length, 2);
  assert.deepEqual(texts(first), texts(again));
  const stopped = await client.chat.completions.create({
    ...greedy,
    stop: [" Paris"],
    logprobs: true,
    top_logprobs: 2,
  });
  assert.equal(stopped.choices[0].finish_reason, "stop");
  assert.doesNotMatch(stopped.choices[0].message.content, /Paris/);
  assert.equal(stopped.choices[0].logprobs.content[0].top_logprobs.length, 2);
});

test("a stream that is given up", async () => {
  const stream = await client.chat.completions.create({
    ...greedy,
    max_tokens: 1000,
    stream: true,
  });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    break;
  }
  stream.controller.abort();
});

test("errors are told apart", async () => {
  const ask = (change) => client.chat.completions.create({ ...greedy, ...change });
  await assert.rejects(ask({ model: "gpt-4" }), (error) => {
    assert(error instanceof OpenAI.NotFoundError);
    return error.code === "model_not_found" && error.param === "model";
  });
  const long = [{ role: "user", content: "word ".repeat(20_000) }];
  await assert.rejects(ask({ messages: long }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    return error.code === "context_length_exceeded";
  });
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), (error) => {
    assert(error instanceof OpenAI.AuthenticationError);
    return error.code === "invalid_api_key";
  });
});

const Verdict = z.object({
  city: z.enum(["Paris", "London", "Rome"]),
  is_capital: z.boolean(),
});

test("structured output", async () => {
  const parsed = await client.chat.completions.parse({
    ...greedy,
    max_tokens: 60,
    response_format: zodResponseFormat(Verdict, "verdict"),
  });
  assert.equal(typeof parsed.choices[0].message.parsed.is_capital, "boolean");
});

const weather = z.object({
  city: z.enum(["Paris", "London", "Rome"]),
  unit: z.enum(["celsius", "fahrenheit"]),
});

test("tools", async () => {
  const asked = {
    ...greedy,
    max_tokens: 80,
    messages: [{ role: "user", content: "What is the weather in Paris?" }],
    tools: [zodFunction({ name: "get_weather", parameters: weather })],
    tool_choice: "required",
    parallel_tool_calls: false,
  };
  const whole = await client.chat.completions.create(asked);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  weather.parse(JSON.parse(call.function.arguments));
  const stream = client.chat.completions.stream(asked);
  let pieces = 0;
  stream.on("tool_calls.function.arguments.delta", () => (pieces += 1));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  assert(pieces > 1, "the arguments came in one piece");
});

test("responses", async () => {
  const asked = { model, input: "What is the capital of France?", temperature: 0 };
  const whole = await client.responses.create({ ...asked, max_output_tokens: 24 });
  assert.match(whole.output_text, /Paris/);
  const stream = client.responses.stream({ ...asked, max_output_tokens: 24 });
  let streamed = "";
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") streamed += event.delta;
  }
  assert.equal(streamed, whole.output_text);
});
