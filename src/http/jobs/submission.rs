//! A native submission: `{endpoint, body}` or `{kind: "custom", model, input}`, and what goes beside it.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::domain::{BatchId, Face, Millis, NewJob};
use crate::http::body::{shortened, unknown_field};
use crate::http::error::ApiError;
use crate::http::prepare::{self, Models, Options, PRIORITY_ASYNC, PRIORITY_BULK};

const CUSTOM_ID_CHARS_MAX: usize = 64;
const SECONDS_MAX: f64 = 30.0 * 86_400.0;
const ATTEMPTS_MAX: u64 = 100;

const FIELDS: [&str; 11] = [
    "endpoint",
    "body",
    "kind",
    "model",
    "input",
    "priority",
    "start_deadline_s",
    "deadline_s",
    "timeout_s",
    "max_attempts",
    "metadata",
];
const NOT_YET: [&str; 3] = ["webhook", "depends_on", "result_ttl_s"];

/// Where a submission comes from.
#[derive(Clone, Debug)]
pub struct Source {
    tenant: Arc<str>,
    now: Millis,
    batch: Option<BatchId>,
}

impl Source {
    /// `POST /v1/jobs`
    pub fn one(tenant: Arc<str>, now: Millis) -> Self {
        Self { tenant, now, batch: None }
    }

    /// `POST /v1/jobs/bulk`
    pub fn bulk(tenant: Arc<str>, now: Millis, batch: BatchId) -> Self {
        Self { tenant, now, batch: Some(batch) }
    }
}

/// Checks a submission and makes the job. Errors name the field, those of the body as `body.<field>`.
pub fn read(models: &Models, mut object: Map<String, Value>, source: Source) -> Result<NewJob, ApiError> {
    refuse_unknown(&object, source.batch.is_some())?;
    let mut options = read_options(&object, &source)?;
    if let Some(custom_id) = custom_id(&object)? {
        options.custom_id = Some(custom_id);
    }
    match object.get("kind") {
        Some(Value::String(kind)) if kind == "custom" => custom(models, object, options),
        None | Some(Value::Null) => {
            let endpoint = text(&object, "endpoint")?;
            refuse(&object, &["model", "input"], "goes with kind: \"custom\"; put the model into body")?;
            match object.shift_remove("body") {
                Some(Value::Object(body)) => {
                    prepare::prepare(models, &endpoint, body, options).map_err(|error| error.below("body"))
                }
                None | Some(Value::Null) => {
                    Err(ApiError::invalid("body", "body is missing: the request as it would be sent to the endpoint"))
                }
                Some(_) => Err(ApiError::invalid("body", "body must be an object")),
            }
        }
        Some(_) => Err(ApiError::invalid("kind", "kind can be left out, or be \"custom\" with model and input")),
    }
}

/// The client's own id of a job in a bulk submission: 1 to 64 characters.
pub fn custom_id(object: &Map<String, Value>) -> Result<Option<String>, ApiError> {
    match object.get("custom_id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) if (1..=CUSTOM_ID_CHARS_MAX).contains(&id.chars().count()) => Ok(Some(id.clone())),
        Some(_) => Err(ApiError::invalid("custom_id", "custom_id must be a string of 1 to 64 characters")),
    }
}

fn refuse_unknown(object: &Map<String, Value>, in_bulk: bool) -> Result<(), ApiError> {
    for name in object.keys() {
        if NOT_YET.contains(&name.as_str()) {
            return Err(ApiError::unsupported(name, format!("{name} is not supported yet: leave it out")));
        }
        let is_known = FIELDS.contains(&name.as_str()) || (in_bulk && name == "custom_id");
        if !is_known {
            return Err(unknown_field(name, &FIELDS));
        }
    }
    Ok(())
}

fn custom(models: &Models, mut object: Map<String, Value>, options: Options) -> Result<NewJob, ApiError> {
    let model = text(&object, "model")?;
    refuse(&object, &["endpoint", "body"], "does not go with kind: \"custom\"; use model and input")?;
    let mut input = match object.shift_remove("input") {
        Some(Value::Object(input)) => input,
        None | Some(Value::Null) => Map::new(),
        Some(_) => return Err(ApiError::invalid("input", "input must be an object")),
    };
    let endpoint = prepare::main_endpoint(models, &model)?;
    input.insert("model".to_owned(), Value::String(model));
    prepare::prepare(models, &endpoint, input, options).map_err(|error| match error.param.as_deref() {
        Some("model") => error,
        _ => error.below("input"),
    })
}

fn text(object: &Map<String, Value>, name: &'static str) -> Result<String, ApiError> {
    match object.get(name) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
        None | Some(Value::Null) => Err(ApiError::invalid(name, format!("{name} is missing"))),
        Some(_) => Err(ApiError::invalid(name, format!("{name} must be a string"))),
    }
}

fn refuse(object: &Map<String, Value>, names: &[&str], why: &str) -> Result<(), ApiError> {
    match names.iter().find(|name| object.contains_key(**name)) {
        Some(name) => Err(ApiError::invalid(*name, format!("{name} {why}"))),
        None => Ok(()),
    }
}

fn read_options(object: &Map<String, Value>, source: &Source) -> Result<Options, ApiError> {
    let default_priority = if source.batch.is_some() { PRIORITY_BULK } else { PRIORITY_ASYNC };
    let from_now = |ms: Option<i64>| ms.map(|ms| source.now + ms);
    let priority = whole(object, "priority", 0, 9)?.and_then(|n| u8::try_from(n).ok());
    let max_attempts = whole(object, "max_attempts", 1, ATTEMPTS_MAX)?.and_then(|n| u32::try_from(n).ok());
    let metadata = object.get("metadata").map(prepare::metadata).transpose()?;
    Ok(Options {
        priority,
        start_deadline: from_now(millis(object, "start_deadline_s")?),
        deadline: from_now(millis(object, "deadline_s")?),
        timeout_ms: millis(object, "timeout_s")?,
        max_attempts,
        metadata,
        batch: source.batch,
        ..Options::new(source.tenant.clone(), Face::Async, default_priority)
    })
}

fn whole(object: &Map<String, Value>, name: &'static str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|n| (low..=high).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let given = shortened(&value.to_string());
                Err(ApiError::invalid(name, format!("{name} must be a whole number from {low} to {high}, not {given}")))
            }
        },
    }
}

/// Seconds, fractions allowed, as ms; more than 0 and at most 30 days.
fn millis(object: &Map<String, Value>, name: &'static str) -> Result<Option<i64>, ApiError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64().filter(|s| *s >= 0.001 && *s <= SECONDS_MAX) {
            #[expect(clippy::cast_possible_truncation, reason = "within 30 days of ms")]
            Some(seconds) => Ok(Some((seconds * 1e3).round() as i64)),
            None => {
                let given = shortened(&value.to_string());
                let message = format!("{name} must be a number of seconds above 0 and up to 30 days, not {given}");
                Err(ApiError::invalid(name, message))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ErrorCode;
    use crate::http::prepare::tests::specs;
    use serde_json::json;

    fn one(value: Value) -> Result<NewJob, ApiError> {
        let Value::Object(object) = value else { panic!("an object") };
        read(&Models::new(specs()), object, Source::one("default".into(), 1_000))
    }

    fn image() -> Value {
        json!({"endpoint": "/v1/images/generations", "body": {"model": "flux", "prompt": "x"}})
    }

    fn image_with(name: &str, value: Value) -> Result<NewJob, ApiError> {
        let mut submission = image();
        submission[name] = value;
        one(submission)
    }

    #[test]
    fn an_openai_body_and_what_goes_beside_it() {
        let mut submission = image();
        submission.as_object_mut().unwrap().extend(
            json!({"priority": 9, "deadline_s": 60, "start_deadline_s": 1.5, "timeout_s": 2, "max_attempts": 1,
                "metadata": {"run": "42"}})
            .as_object()
            .unwrap()
            .clone(),
        );
        let job = one(submission).unwrap();
        assert_eq!((job.model.as_str(), job.priority, job.face), ("flux", 9, Face::Async));
        assert_eq!((job.deadline, job.start_deadline), (Some(61_000), Some(2_500)));
        assert_eq!((job.timeout_ms, job.max_attempts, job.metadata["run"].as_str()), (2_000, 1, "42"));
        let plain = one(image()).unwrap();
        assert_eq!((plain.priority, plain.timeout_ms, plain.max_attempts), (5, 600_000, 3));
    }

    #[test]
    fn a_custom_input_goes_to_the_models_main_endpoint() {
        let job = one(json!({"kind": "custom", "model": "depth", "input": {"url": "x"}})).unwrap();
        assert_eq!(job.endpoint, "/v1/depth");
        assert_eq!(job.body, r#"{"url":"x","model":"org/depth"}"#);
        assert!(one(json!({"kind": "custom", "model": "depth"})).is_ok());
    }

    #[test]
    fn faults_are_named() {
        let param = |result: Result<NewJob, ApiError>| {
            let error = result.unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidRequest, "{}", error.message);
            error.param.clone().unwrap()
        };
        assert_eq!(param(image_with("priorty", json!(1))), "priorty");
        assert_eq!(param(image_with("custom_id", json!("x"))), "custom_id");
        assert_eq!(param(image_with("priority", json!(10))), "priority");
        assert_eq!(param(image_with("deadline_s", json!(0))), "deadline_s");
        assert_eq!(param(image_with("deadline_s", json!("60"))), "deadline_s");
        assert_eq!(param(image_with("max_attempts", json!(0))), "max_attempts");
        assert_eq!(param(image_with("metadata", json!([]))), "metadata");
        assert_eq!(param(image_with("body", json!("x"))), "body");
        assert_eq!(param(image_with("body", json!({"model": "flux"}))), "body.prompt");
        assert_eq!(param(image_with("endpoint", json!("/v1/depth"))), "body.model");
        assert_eq!(param(image_with("endpoint", Value::Null)), "endpoint");
        assert_eq!(param(image_with("kind", json!("image"))), "kind");
        assert_eq!(param(image_with("kind", json!("custom"))), "model");
        assert_eq!(param(one(json!({"kind": "custom", "model": "depth", "input": 3}))), "input");
        let missing = image_with("body", json!({"model": "fluxx", "prompt": "x"})).unwrap_err();
        assert_eq!((missing.code, missing.param.as_deref()), (ErrorCode::ModelNotFound, Some("body.model")));
    }

    #[test]
    fn what_is_planned_says_so() {
        for name in NOT_YET {
            assert_eq!(image_with(name, json!(1)).unwrap_err().code, ErrorCode::UnsupportedParameter);
        }
    }
}
