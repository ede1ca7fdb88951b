//! Which jobs one pass of a worker can serve together, and how that is said to a person.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::JobKind;

/// Fields of a body that may differ between jobs of one run; all others make the batch key.
const PER_ITEM_FIELDS: [&str; 10] =
    ["prompt", "input", "seed", "n", "user", "metadata", "messages", "voice", "response_format", "echo"];
/// Fields that are shown; of a body they say nothing but how much work it is.
const SHOWN_FIELDS: [&str; 11] = [
    "size",
    "width",
    "height",
    "n",
    "steps",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "duration",
    "temperature",
    "top_k",
];
/// Longest value that is shown, in characters.
const SHOWN_CHARS: usize = 16;

/// The batch key of jobs that share a run with no other.
pub const ALONE: i64 = i64::MAX;

/// Bits that a batch key has. Keys that were stored by earlier versions may have one more.
const KEY_BITS: u64 = ALONE.cast_unsigned();

/// A number that is equal for jobs which one pass of the worker can serve: same endpoint, same shape-giving parameters
/// (size, steps, guidance, duration). FNV-1a over the canonical JSON of the body without its per-item fields.
///
/// Of images, a negative prompt counts by its presence, and the number of images counts. Sound has one random generator a
/// pass: a job with a seed is [`ALONE`]. No job may get the key of another one that the worker would not serve in the same
/// pass (`tests/fixtures/batch_keys.json`); the other way round only a chance to share is lost.
pub fn batch_key(endpoint: &str, body: &Map<String, Value>) -> i64 {
    let kind = JobKind::of_endpoint(endpoint);
    if kind == JobKind::Audio && body.get("seed").is_some_and(|seed| !seed.is_null()) {
        return ALONE;
    }
    let shape: BTreeMap<&str, Value> =
        body.iter().filter_map(|(name, value)| Some((name.as_str(), part(kind, name, value)?))).collect();
    let text = format!("{endpoint}\n{}", json!(shape));
    hash(&text)
}

/// FNV-1a.
pub(super) fn hash(text: &str) -> i64 {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    // A waiting job keeps 63 bits of it: the same for one that never waits.
    (hash & KEY_BITS).cast_signed()
}

/// What a field adds to the key; `None`: nothing.
fn part(kind: JobKind, name: &str, value: &Value) -> Option<Value> {
    let is_image = kind == JobKind::Image;
    if !is_image && kind != JobKind::Audio {
        return (!PER_ITEM_FIELDS.contains(&name)).then(|| value.clone());
    }
    match (name, value) {
        (_, Value::Null) => None,
        ("n", _) if is_image => number(value).filter(|n| *n != json!(1)),
        ("size", _) if is_image && value == "auto" => None,
        ("negative_prompt", Value::String(_)) if is_image => Some(json!(true)),
        (name, _) if PER_ITEM_FIELDS.contains(&name) => None,
        _ => number(value).or_else(|| Some(value.clone())),
    }
}

/// A number, written as a whole one if it is one.
fn number(value: &Value) -> Option<Value> {
    /// All whole numbers up to this are exact.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let number = value.as_number()?;
    #[expect(clippy::cast_possible_truncation, reason = "whole, and small enough")]
    let whole = number.as_f64().filter(|f| number.is_f64() && f.fract() == 0.0 && f.abs() < EXACT).map(|f| f as i64);
    Some(whole.map_or_else(|| value.clone(), |whole| json!(whole)))
}

/// The shape of a job in words, `size 1024x1024, steps 4`; empty: all of it is left to the worker. Holds nothing of what was
/// written by a person.
pub fn words(body: &Map<String, Value>) -> String {
    let shown = SHOWN_FIELDS.iter().filter_map(|name| {
        let text = match body.get(*name)? {
            Value::String(text) if text.chars().all(|c| c.is_ascii_digit() || c == 'x') => text.clone(),
            value @ Value::Number(_) => value.to_string(),
            _ => return None,
        };
        (text.len() <= SHOWN_CHARS).then(|| format!("{name} {text}"))
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// How many jobs the passes of a model take, as it outlives a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KeptBatches {
    /// Memory of the largest GPU of the box that it was learned on, in bytes; `None`: on the CPU, or nobody knew.
    pub device_bytes: Option<u64>,
    /// The shapes used last, the latest first.
    pub shapes: Vec<KeptShape>,
}

/// What was learned about one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptShape {
    /// Its batch key.
    pub key: i64,
    /// In words.
    pub words: String,
    /// The size in use, as a power of two; `None`: that of the first size is not known yet.
    pub level: Option<u32>,
    /// Most jobs of a pass since one ran out of memory; `None`: none has.
    pub cap: Option<u32>,
    /// Jobs a second by the size as a power of two, as far as they are known; also of sizes beyond `cap`.
    pub rates: Vec<(u32, f64)>,
    /// What `cap` comes from, the oldest first; earlier releases did not say.
    #[serde(default)]
    pub halvings: Vec<Halving>,
}

/// A pass that ran out of memory, and the limit that it set on its shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Halving {
    /// Most jobs of a pass since.
    pub most: u32,
    /// The size in use before, as a power of two.
    pub level: Option<u32>,
    /// Numbers of the jobs in the pass.
    pub jobs: Vec<i64>,
    /// One of them has run out of memory alone since: it goes with the next pass that is answered.
    pub own_fault: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: &Value) -> &Map<String, Value> {
        value.as_object().expect("object")
    }

    #[test]
    fn batch_key_sees_shape_and_not_content() {
        let key = |v: Value| batch_key("/v1/images/generations", object(&v));
        let base = key(json!({"model": "flux", "prompt": "a", "size": "64x64", "seed": 1}));
        assert_eq!(base, key(json!({"seed": 2, "size": "64x64", "prompt": "b", "model": "flux"})));
        assert_ne!(base, key(json!({"model": "flux", "prompt": "a", "size": "128x64", "seed": 1})));
    }

    #[test]
    fn keys_have_as_many_bits_as_a_waiting_job_keeps() {
        let mut keys = (0..64).map(|size| batch_key("/v1/images/generations", object(&json!({"size": size}))));
        assert!(keys.all(|key| key >= 0));
    }

    #[test]
    fn equal_keys_share_a_pass_in_our_workers_too() {
        let all: Value =
            serde_json::from_str(include_str!("../../tests/fixtures/batch_keys.json")).expect("the fixture");
        for worker in ["flux", "musicgen"] {
            let cases = all[worker].as_array().expect("cases");
            let key_of = |case: &Value| batch_key(case["endpoint"].as_str().expect("a path"), object(&case["body"]));
            for a in cases {
                assert_eq!(a["key"] == "alone", key_of(a) == ALONE, "{a}");
                for b in cases {
                    assert_eq!(a["key"] == b["key"], key_of(a) == key_of(b), "{a}\n{b}");
                    assert!(a["key"] != b["key"] || a["key"] == "alone" || a["worker"] == b["worker"], "{a}\n{b}");
                }
            }
        }
    }

    #[test]
    fn other_bodies_are_left_as_they_are() {
        let key = |v: Value| batch_key("/v1/rerank", object(&v));
        assert_ne!(key(json!({"top": 1})), key(json!({"top": 1.0})));
        assert_ne!(key(json!({})), key(json!({"top": null})));
        assert_eq!(key(json!({"n": 1})), key(json!({"n": 2})));
    }

    #[test]
    fn words_show_sizes_and_no_text() {
        let body = json!({"prompt": "a secret", "negative_prompt": "another", "size": "512x512", "steps": 4, "n": 2,
                          "duration": "a while", "top_k": null, "guidance_scale": 2.5});
        assert_eq!(words(object(&body)), "size 512x512, n 2, steps 4, guidance_scale 2.5");
        assert_eq!(words(&Map::new()), "");
    }
}
