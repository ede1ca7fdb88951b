//! Puts the chunks of a stream together to the object that the same request without `stream` would have got. Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::domain::JobKind;

/// Most choices, and most tool calls of one choice.
const PARTS_LIMIT: usize = 1024;
/// Parts of a chat delta that are texts cut in pieces.
const PIECES: [&str; 4] = ["content", "reasoning_content", "reasoning", "refusal"];
/// Why a choice may end for its answer to count.
const FINISHED: [&str; 5] = ["stop", "length", "tool_calls", "content_filter", "function_call"];

/// Whether `finish_reason` is one with which a choice is whole. vLLM's `abort` is not.
pub fn is_finished(finish_reason: &str) -> bool {
    FINISHED.contains(&finish_reason)
}

/// What a chunk adds, by what it means to a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Nothing of the answer itself: a role, empty text, the usage.
    Frame,
    /// Text, a tool call or the end of a choice.
    Content,
}

/// Why chunks make no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// The chunk does not have the shape of its endpoint.
    #[error("a chunk of the stream {0}")]
    Malformed(&'static str),
    /// A choice ended with a reason that means it is not whole, for example `abort`.
    #[error("choice {index} ended with finish_reason `{reason}`")]
    Aborted {
        /// Which.
        index: u64,
        /// As the engine said it.
        reason: String,
    },
    /// The stream ended and this choice had not.
    #[error("the stream ended before choice {index} had a finish_reason")]
    Unfinished {
        /// Which.
        index: u64,
    },
    /// The stream ended without a choice.
    #[error("the stream ended without a choice")]
    Empty,
}

/// Takes the chunks of one stream.
#[derive(Clone, Debug)]
pub struct Assembler {
    kind: JobKind,
    head: Map<String, Value>,
    choices: BTreeMap<u64, Choice>,
    usage: Option<Value>,
    /// Payloads of endpoints whose chunks we do not know.
    others: Vec<Value>,
}

#[derive(Clone, Debug, Default)]
struct Choice {
    /// `message` of a chat, empty for completions.
    message: Map<String, Value>,
    text: String,
    tool_calls: BTreeMap<u64, Map<String, Value>>,
    /// `finish_reason`, `logprobs` and what else the engine adds.
    rest: Map<String, Value>,
}

impl Assembler {
    /// For a stream of the endpoint, for example `/v1/chat/completions`.
    pub fn new(endpoint: &str) -> Self {
        Self {
            kind: JobKind::of_endpoint(endpoint),
            head: Map::new(),
            choices: BTreeMap::new(),
            usage: None,
            others: Vec::new(),
        }
    }

    /// Adds one data payload. An `Aborted` choice makes the whole answer a failure.
    pub fn add(&mut self, chunk: Value) -> Result<Added, AssembleError> {
        if !matches!(self.kind, JobKind::Chat | JobKind::Completion) {
            self.others.push(chunk);
            return Ok(Added::Content);
        }
        let Value::Object(chunk) = chunk else {
            return Err(AssembleError::Malformed("is no JSON object"));
        };
        let mut added = Added::Frame;
        for (key, value) in chunk {
            match (key.as_str(), value) {
                ("object", _) | (_, Value::Null) => {}
                ("usage", usage) => self.usage = Some(usage),
                ("choices", Value::Array(choices)) => {
                    for choice in choices {
                        if self.add_choice(choice)? == Added::Content {
                            added = Added::Content;
                        }
                    }
                }
                ("choices", _) => {
                    return Err(AssembleError::Malformed("has `choices` that are no array"));
                }
                ("id" | "created" | "model", value) => {
                    self.head.entry(key).or_insert(value);
                }
                (_, value) => {
                    self.head.insert(key, value);
                }
            }
        }
        Ok(added)
    }

    /// Whether every choice so far has ended well.
    pub fn is_complete(&self) -> bool {
        let finished = |c: &Choice| c.rest.get("finish_reason").is_some_and(Value::is_string);
        match self.kind {
            JobKind::Chat | JobKind::Completion => !self.choices.is_empty() && self.choices.values().all(finished),
            _ => true,
        }
    }

    /// The answer and its usage. Endpoints whose chunks we do not know give `{"object":"list","data":[chunks]}`.
    pub fn finish(self) -> Result<(Value, Option<Value>), AssembleError> {
        if !matches!(self.kind, JobKind::Chat | JobKind::Completion) {
            return Ok((json!({"object": "list", "data": self.others}), None));
        }
        if self.choices.is_empty() {
            return Err(AssembleError::Empty);
        }
        let is_chat = self.kind == JobKind::Chat;
        let mut choices = Vec::with_capacity(self.choices.len());
        for (index, choice) in self.choices {
            choices.push(choice.finish(index, is_chat)?);
        }
        let mut head = self.head;
        let mut answer = Map::new();
        if let Some(id) = head.shift_remove("id") {
            answer.insert("id".into(), id);
        }
        let object = if is_chat { "chat.completion" } else { "text_completion" };
        answer.insert("object".into(), object.into());
        for key in ["created", "model"] {
            if let Some(value) = head.shift_remove(key) {
                answer.insert(key.into(), value);
            }
        }
        answer.insert("choices".into(), choices.into());
        if let Some(usage) = &self.usage {
            answer.insert("usage".into(), usage.clone());
        }
        answer.extend(head);
        Ok((answer.into(), self.usage))
    }

    fn add_choice(&mut self, choice: Value) -> Result<Added, AssembleError> {
        let Value::Object(choice) = choice else {
            return Err(AssembleError::Malformed("has a choice that is no object"));
        };
        let index = index_of(&choice);
        if self.choices.len() >= PARTS_LIMIT && !self.choices.contains_key(&index) {
            return Err(AssembleError::Malformed("has too many choices"));
        }
        let into = self.choices.entry(index).or_default();
        let mut added = Added::Frame;
        for (key, value) in choice {
            match (key.as_str(), value) {
                ("index", _) | (_, Value::Null) => {}
                ("delta", Value::Object(delta)) => {
                    if into.add_delta(delta)? == Added::Content {
                        added = Added::Content;
                    }
                }
                ("text", Value::String(text)) => {
                    if !text.is_empty() {
                        added = Added::Content;
                    }
                    into.text.push_str(&text);
                }
                ("finish_reason", Value::String(reason)) => {
                    if !is_finished(&reason) {
                        return Err(AssembleError::Aborted { index, reason });
                    }
                    added = Added::Content;
                    into.rest.insert(key, reason.into());
                }
                (_, value) => merge(into.rest.entry(key).or_insert(Value::Null), value),
            }
        }
        Ok(added)
    }
}

impl Choice {
    fn add_delta(&mut self, delta: Map<String, Value>) -> Result<Added, AssembleError> {
        let mut added = Added::Frame;
        for (key, value) in delta {
            match (key.as_str(), value) {
                (_, Value::Null) => {}
                ("tool_calls", Value::Array(calls)) => {
                    for call in calls {
                        self.add_tool_call(call)?;
                        added = Added::Content;
                    }
                }
                ("function_call", Value::Object(call)) => {
                    added = Added::Content;
                    let into = self.message.entry(key).or_insert_with(|| json!({}));
                    if let Value::Object(into) = into {
                        add_function(into, call);
                    }
                }
                (name, Value::String(piece)) if PIECES.contains(&name) => {
                    if !piece.is_empty() {
                        added = Added::Content;
                    }
                    match self.message.get_mut(name) {
                        Some(Value::String(text)) => text.push_str(&piece),
                        _ => {
                            self.message.insert(key, piece.into());
                        }
                    }
                }
                (_, value) => merge(self.message.entry(key).or_insert(Value::Null), value),
            }
        }
        Ok(added)
    }

    fn add_tool_call(&mut self, call: Value) -> Result<(), AssembleError> {
        let Value::Object(call) = call else {
            return Err(AssembleError::Malformed("has a tool call that is no object"));
        };
        let index = index_of(&call);
        if self.tool_calls.len() >= PARTS_LIMIT && !self.tool_calls.contains_key(&index) {
            return Err(AssembleError::Malformed("has too many tool calls"));
        }
        let into = self.tool_calls.entry(index).or_default();
        for (key, value) in call {
            match (key.as_str(), value) {
                ("index", _) | (_, Value::Null) => {}
                ("function", Value::Object(function)) => {
                    let into = into.entry(key).or_insert_with(|| json!({}));
                    if let Value::Object(into) = into {
                        add_function(into, function);
                    }
                }
                (_, value) => {
                    into.insert(key, value);
                }
            }
        }
        Ok(())
    }

    fn finish(self, index: u64, is_chat: bool) -> Result<Value, AssembleError> {
        let mut rest = self.rest;
        let Some(finish_reason) = rest.shift_remove("finish_reason") else {
            return Err(AssembleError::Unfinished { index });
        };
        let mut choice = Map::new();
        choice.insert("index".into(), index.into());
        if is_chat {
            choice.insert("message".into(), message(self.message, self.tool_calls).into());
        } else {
            choice.insert("text".into(), self.text.into());
        }
        choice.insert("logprobs".into(), rest.shift_remove("logprobs").unwrap_or(Value::Null));
        choice.insert("finish_reason".into(), finish_reason);
        choice.extend(rest);
        Ok(choice.into())
    }
}

fn message(mut parts: Map<String, Value>, tool_calls: BTreeMap<u64, Map<String, Value>>) -> Map<String, Value> {
    let mut message = Map::new();
    let role = parts.shift_remove("role");
    message.insert("role".into(), role.unwrap_or_else(|| "assistant".into()));
    let content = parts.shift_remove("content").unwrap_or(Value::Null);
    let is_empty = content.as_str().is_some_and(str::is_empty);
    let content = if is_empty && !tool_calls.is_empty() {
        Value::Null // As without `stream`: a call of a tool has no text.
    } else {
        content
    };
    message.insert("content".into(), content);
    message.extend(parts);
    if !tool_calls.is_empty() {
        let calls: Vec<Value> = tool_calls.into_values().map(Value::Object).collect();
        message.insert("tool_calls".into(), calls.into());
    }
    message
}

/// Arguments come in pieces; a name comes whole, once or repeated.
fn add_function(into: &mut Map<String, Value>, function: Map<String, Value>) {
    for (key, value) in function {
        match (into.get_mut(&key), value) {
            (_, Value::Null) => {}
            (Some(Value::String(text)), Value::String(piece)) if key == "arguments" => {
                text.push_str(&piece);
            }
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// Lists grow, objects are merged, anything else is replaced: `logprobs` and engines' own additions.
fn merge(into: &mut Value, value: Value) {
    match (into, value) {
        (Value::Array(list), Value::Array(more)) => list.extend(more),
        (Value::Object(map), Value::Object(more)) => {
            for (key, value) in more {
                merge(map.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (into, value) => *into = value,
    }
}

fn index_of(part: &Map<String, Value>) -> u64 {
    part.get("index").and_then(Value::as_u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assemble(endpoint: &str, chunks: &[Value]) -> Result<(Value, Option<Value>), AssembleError> {
        let mut assembler = Assembler::new(endpoint);
        for chunk in chunks {
            assembler.add(chunk.clone())?;
        }
        assembler.finish()
    }

    fn chat(choices: Value) -> Value {
        json!({"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": choices})
    }

    fn delta(index: u64, delta: Value, finish: Option<&str>) -> Value {
        chat(json!([{"index": index, "delta": delta, "finish_reason": finish}]))
    }

    #[test]
    fn chat_with_two_choices_interleaved() {
        let (answer, usage) = assemble(
            "/v1/chat/completions",
            &[
                delta(0, json!({"role": "assistant", "content": ""}), None),
                delta(1, json!({"role": "assistant", "content": "B"}), None),
                delta(0, json!({"content": "Hel"}), None),
                delta(0, json!({"content": "lo"}), None),
                delta(1, json!({"content": "ye"}), Some("length")),
                delta(0, json!({}), Some("stop")),
                json!({"id": "c1", "choices": [], "usage": {"total_tokens": 9}, "system_fingerprint": "f"}),
            ],
        )
        .unwrap();
        assert_eq!(
            answer,
            json!({"id": "c1", "object": "chat.completion", "created": 5, "model": "m", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": null, "finish_reason": "stop"},
                {"index": 1, "message": {"role": "assistant", "content": "Bye"}, "logprobs": null, "finish_reason": "length"},
            ], "usage": {"total_tokens": 9}, "system_fingerprint": "f"})
        );
        assert_eq!(usage, Some(json!({"total_tokens": 9})));
    }

    #[test]
    fn tool_calls_are_merged_by_index() {
        let call = |v: Value| delta(0, json!({"tool_calls": [v]}), None);
        let (answer, _) = assemble(
            "/v1/chat/completions",
            &[
                delta(0, json!({"role": "assistant", "content": ""}), None),
                call(json!({"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}})),
                call(json!({"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}})),
                call(json!({"index": 0, "function": {"arguments": "{\"x\""}})),
                call(json!({"index": 0, "function": {"name": null, "arguments": ":1}"}})),
                delta(0, json!({}), Some("tool_calls")),
            ],
        )
        .unwrap();
        assert_eq!(
            answer["choices"][0]["message"],
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ]})
        );
    }

    #[test]
    fn reasoning_refusal_and_logprobs_grow() {
        let with_logprobs = |token: &str| {
            chat(json!([{"index": 0, "delta": {"content": token, "reasoning_content": token, "refusal": null},
                "logprobs": {"content": [{"token": token}]}, "finish_reason": null}]))
        };
        let (answer, _) = assemble(
            "/v1/chat/completions",
            &[with_logprobs("a"), with_logprobs("b"), delta(0, json!({"refusal": "no"}), Some("content_filter"))],
        )
        .unwrap();
        let choice = &answer["choices"][0];
        assert_eq!(
            choice["message"],
            json!({"role": "assistant", "content": "ab", "reasoning_content": "ab", "refusal": "no"})
        );
        assert_eq!(choice["logprobs"], json!({"content": [{"token": "a"}, {"token": "b"}]}));
    }

    #[test]
    fn completions_have_text() {
        let chunk = |text: &str, finish: Option<&str>| {
            json!({"id": "t", "object": "text_completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "text": text, "logprobs": {"tokens": [text], "token_logprobs": [0.5]}, "finish_reason": finish}]})
        };
        let (answer, usage) = assemble("/v1/completions", &[chunk("a", None), chunk("b", Some("stop"))]).unwrap();
        assert_eq!(
            answer["choices"],
            json!([{"index": 0, "text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [0.5, 0.5]}, "finish_reason": "stop"}])
        );
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(usage, None);
    }

    #[test]
    fn an_unfinished_or_aborted_choice_is_no_answer() {
        let endpoint = "/v1/chat/completions";
        let text = delta(0, json!({"content": "a"}), None);
        assert_eq!(assemble(endpoint, std::slice::from_ref(&text)), Err(AssembleError::Unfinished { index: 0 }));
        assert_eq!(assemble(endpoint, &[]), Err(AssembleError::Empty));
        let aborted = delta(0, json!({}), Some("abort"));
        assert_eq!(
            assemble(endpoint, &[text, aborted]),
            Err(AssembleError::Aborted { index: 0, reason: "abort".into() })
        );
        let one_of_two = [delta(0, json!({"content": "a"}), Some("stop")), delta(1, json!({"content": "a"}), None)];
        assert_eq!(assemble(endpoint, &one_of_two), Err(AssembleError::Unfinished { index: 1 }));
    }

    #[test]
    fn says_what_a_chunk_adds() {
        let mut assembler = Assembler::new("/v1/chat/completions");
        let mut add = |chunk: Value| assembler.add(chunk).unwrap();
        assert_eq!(add(delta(0, json!({"role": "assistant", "content": ""}), None)), Added::Frame);
        assert_eq!(add(delta(0, json!({"content": "x"}), None)), Added::Content);
        assert_eq!(add(delta(0, json!({}), Some("stop"))), Added::Content);
        assert_eq!(add(json!({"choices": [], "usage": {}})), Added::Frame);
    }

    #[test]
    fn odd_chunks_are_named() {
        let mut assembler = Assembler::new("/v1/chat/completions");
        for odd in [
            json!([1]),
            json!({"choices": 3}),
            json!({"choices": ["x"]}),
            chat(json!([{"delta": {"tool_calls": [7]}}])),
        ] {
            assert!(matches!(assembler.add(odd.clone()), Err(AssembleError::Malformed(_))), "{odd}");
        }
    }
}
