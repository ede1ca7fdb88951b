//! From a parsed body to a [`NewJob`]: what is read, what is stripped, what is checked, and what goes to the worker
//! verbatim. The same for the OpenAI shim and for native submissions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::domain::job::Present;
use crate::domain::shape::batch_key;
use crate::domain::{BatchId, ErrorCode, Face, JobId, JobKind, Millis, ModelKind, ModelSpec, NewJob};
use crate::http::body::{by_likeness, shortened};
use crate::http::error::ApiError;

/// Priority of a call whose caller holds the line.
pub const PRIORITY_SYNC: u8 = 7;
/// Priority of a single asynchronous job.
pub const PRIORITY_ASYNC: u8 = 5;
/// Priority of jobs submitted in bulk.
pub const PRIORITY_BULK: u8 = 3;
const PRIORITY_TIER_HIGH: u8 = 8;
const PRIORITY_TIER_FLEX: u8 = 3;
const PRIORITY_BACKGROUND: u8 = 1;

const METADATA_PAIRS_MAX: usize = 16;
const METADATA_KEY_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;
const IMAGES_MAX: u64 = 10;
const AUDIO_FORMATS: [&str; 4] = ["wav", "flac", "mp3", "opus"];

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const SPEECH: &str = "/v1/audio/speech";
const AUDIO: &str = "/v1/audio/generations";

/// The models by every name that clients may use.
#[derive(Debug)]
pub struct Models {
    /// By the order of `models.yaml`.
    pub specs: Vec<Arc<ModelSpec>>,
    by_name: HashMap<String, usize>,
}

impl Models {
    /// Indexes names and aliases.
    pub fn new(specs: Vec<ModelSpec>) -> Self {
        let mut by_name = HashMap::new();
        for (index, spec) in specs.iter().enumerate() {
            by_name.extend(spec.aliases.iter().map(|alias| (alias.clone(), index)));
        }
        by_name.extend(specs.iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)));
        Self { specs: specs.into_iter().map(Arc::new).collect(), by_name }
    }

    /// The model that clients call `name`; the error lists those there are, nearest first.
    pub fn get(&self, name: &str) -> Result<&Arc<ModelSpec>, ApiError> {
        if let Some(index) = self.by_name.get(name) {
            return Ok(&self.specs[*index]);
        }
        let known = by_likeness(name, self.specs.iter().map(|spec| spec.name.as_str()));
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let message = format!("the model `{}` does not exist; there are: {known}", shortened(name));
        Err(ApiError::new(ErrorCode::ModelNotFound, message).at("model"))
    }

    fn serving(&self, endpoint: &str) -> Vec<&str> {
        self.specs.iter().filter(|spec| spec.serves(endpoint)).map(|spec| spec.name.as_str()).collect()
    }
}

/// What a submission says beside its body.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose it is.
    pub tenant: Arc<str>,
    /// By which face it comes in.
    pub face: Face,
    /// Unless the request says otherwise.
    pub default_priority: u8,
    /// 0 to 9.
    pub priority: Option<u8>,
    /// To be started before, ms since the epoch.
    pub start_deadline: Option<Millis>,
    /// To be finished before, ms since the epoch.
    pub deadline: Option<Millis>,
    /// Longest time of one attempt, in ms.
    pub timeout_ms: Option<i64>,
    /// Budget of retriable failures.
    pub max_attempts: Option<u32>,
    /// The client's own pairs; `None`: those of the body, if any.
    pub metadata: Option<BTreeMap<String, String>>,
    /// What it was submitted together with.
    pub batch: Option<BatchId>,
    /// The client's own id within the batch.
    pub custom_id: Option<String>,
    /// The job this one repeats.
    pub retry_of: Option<JobId>,
}

impl Options {
    /// Nothing but who asks, and how.
    pub fn new(tenant: Arc<str>, face: Face, default_priority: u8) -> Self {
        Self {
            tenant,
            face,
            default_priority,
            priority: None,
            start_deadline: None,
            deadline: None,
            timeout_ms: None,
            max_attempts: None,
            metadata: None,
            batch: None,
            custom_id: None,
            retry_of: None,
        }
    }
}

/// Checks a body for `endpoint` and makes the job. Errors name the body's field.
pub fn prepare(
    models: &Models,
    endpoint: &str,
    mut body: Map<String, Value>,
    options: Options,
) -> Result<NewJob, ApiError> {
    let caller_model = take_model(&body)?;
    let spec = models.get(&caller_model)?;
    if !spec.serves(endpoint) {
        return Err(wrong_endpoint(models, spec, endpoint));
    }
    check_required(endpoint, &body)?;
    let kind = JobKind::of_endpoint(endpoint);
    let stream = take_stream(kind, &body)?;
    let tier = take_tier(&mut body, &options)?;
    let own_metadata = take_metadata(&mut body)?;
    take_store_and_background(&mut body);
    let present = Present {
        image_url: kind == JobKind::Image && take_image_format(&mut body)?,
        include_usage: stream && ask_for_usage(&mut body)?,
        model: caller_model,
        service_tier: tier.name,
    };
    match kind {
        JobKind::Image => check_image_count(&body)?,
        JobKind::Audio => check_audio_format(&body)?,
        JobKind::Chat | JobKind::Completion | JobKind::Custom => {}
    }
    body.insert("model".to_owned(), Value::String(spec.upstream_model.clone()));
    let batch_key = batch_key(endpoint, &body);
    let timeout_ms = i64::try_from(spec.timeout.as_millis()).unwrap_or(i64::MAX);
    Ok(NewJob {
        endpoint: endpoint.to_owned(),
        model: spec.name.clone(),
        tenant: options.tenant.to_string(),
        batch: options.batch,
        custom_id: options.custom_id,
        face: options.face,
        priority: options.priority.unwrap_or(tier.priority),
        body: Bytes::from(Value::Object(body).to_string()),
        batch_key,
        stream,
        present,
        start_deadline: options.start_deadline,
        deadline: options.deadline,
        timeout_ms: options.timeout_ms.unwrap_or(timeout_ms),
        max_attempts: options.max_attempts.unwrap_or(spec.max_attempts),
        metadata: options.metadata.unwrap_or(own_metadata),
        retry_of: options.retry_of,
    })
}

fn take_model(body: &Map<String, Value>) -> Result<String, ApiError> {
    match body.get("model") {
        Some(Value::String(name)) if !name.is_empty() => Ok(name.clone()),
        None | Some(Value::Null) => Err(ApiError::invalid("model", "model is missing: name one of GET /v1/models")),
        Some(_) => Err(ApiError::invalid("model", "model must be the name of a model, a string")),
    }
}

fn wrong_endpoint(models: &Models, spec: &ModelSpec, endpoint: &str) -> ApiError {
    let others = match models.serving(endpoint)[..] {
        [] => "no model here does".to_owned(),
        ref names => format!("these do: {}", names.join(", ")),
    };
    let own = spec.endpoints.join(", ");
    let endpoint = shortened(endpoint);
    ApiError::invalid("model", format!("`{}` serves {own}, not {endpoint}; {others}", spec.name))
}

/// Fields without which no engine can do anything: refused before a model is loaded for them.
fn check_required(endpoint: &str, body: &Map<String, Value>) -> Result<(), ApiError> {
    let has = |field: &str| body.get(field).is_some_and(|value| !value.is_null());
    let need = |fields: &[&str]| {
        if fields.iter().any(|field| has(field)) {
            return Ok(());
        }
        Err(ApiError::invalid(fields[0], format!("{} is missing", fields[0])))
    };
    match endpoint {
        CHAT => {
            need(&["messages"])?;
            let is_list = body["messages"].as_array().is_some_and(|messages| !messages.is_empty());
            if is_list { Ok(()) } else { Err(ApiError::invalid("messages", "messages must be a list of at least one")) }
        }
        COMPLETIONS => need(&["prompt", "prompt_embeds"]),
        SPEECH => need(&["input"]),
        AUDIO => need(&["prompt", "input"]),
        _ if JobKind::of_endpoint(endpoint) == JobKind::Image => need(&["prompt"]),
        _ => Ok(()),
    }
}

fn take_stream(kind: JobKind, body: &Map<String, Value>) -> Result<bool, ApiError> {
    let wanted = match body.get("stream") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(wanted)) => *wanted,
        Some(_) => return Err(ApiError::invalid("stream", "stream must be true or false")),
    };
    match kind {
        JobKind::Image | JobKind::Audio if wanted => {
            Err(ApiError::unsupported("stream", format!("{kind} answers are not streamed: leave stream out")))
        }
        JobKind::Chat | JobKind::Completion | JobKind::Image | JobKind::Audio | JobKind::Custom => Ok(wanted),
    }
}

struct Tier {
    name: String,
    priority: u8,
}

/// `service_tier` and `background` choose the priority; both are ours, not the worker's.
fn take_tier(body: &mut Map<String, Value>, options: &Options) -> Result<Tier, ApiError> {
    let background = body.get("background") == Some(&Value::Bool(true));
    let default = if background { PRIORITY_BACKGROUND } else { options.default_priority };
    let Some(value) = body.shift_remove("service_tier").filter(|value| !value.is_null()) else {
        return Ok(Tier { name: String::new(), priority: default });
    };
    let priority = match value.as_str() {
        Some("auto" | "default") => default,
        Some("priority") => PRIORITY_TIER_HIGH,
        Some("flex") => PRIORITY_TIER_FLEX,
        _ => {
            let message = "service_tier must be auto, default, priority or flex";
            return Err(ApiError::invalid("service_tier", message));
        }
    };
    Ok(Tier { name: value.as_str().unwrap_or_default().to_owned(), priority })
}

fn take_metadata(body: &mut Map<String, Value>) -> Result<BTreeMap<String, String>, ApiError> {
    body.shift_remove("metadata").map_or_else(|| Ok(BTreeMap::new()), |value| metadata(&value))
}

/// The client's own pairs: at most 16, keys to 64 characters, values strings to 512.
pub fn metadata(value: &Value) -> Result<BTreeMap<String, String>, ApiError> {
    let invalid = |message: String| ApiError::invalid("metadata", message);
    let pairs = match value {
        Value::Null => return Ok(BTreeMap::new()),
        Value::Object(pairs) => pairs,
        _ => return Err(invalid("metadata must be an object of strings".to_owned())),
    };
    if pairs.len() > METADATA_PAIRS_MAX {
        return Err(invalid(format!("metadata has {} pairs, {METADATA_PAIRS_MAX} are the most", pairs.len())));
    }
    pairs
        .iter()
        .map(|(key, value)| {
            let shown = shortened(key);
            if key.is_empty() || key.chars().count() > METADATA_KEY_CHARS_MAX {
                return Err(invalid(format!("the key `{shown}` must have 1 to {METADATA_KEY_CHARS_MAX} characters")));
            }
            let text = value.as_str().ok_or_else(|| invalid(format!("the value of `{shown}` must be a string")))?;
            if text.chars().count() > METADATA_VALUE_CHARS_MAX {
                let message = format!("the value of `{shown}` is longer than {METADATA_VALUE_CHARS_MAX} characters");
                return Err(invalid(message));
            }
            Ok((key.clone(), text.to_owned()))
        })
        .collect()
}

/// `store` says nothing to a worker, nor does `background` where it is yes or no (for images it is a colour).
fn take_store_and_background(body: &mut Map<String, Value>) {
    body.shift_remove("store");
    if body.get("background").is_some_and(|value| value.is_boolean() || value.is_null()) {
        body.shift_remove("background");
    }
}

/// Whether images are wanted as URLs. Workers are always asked for `b64_json`: a URL of theirs would lead nowhere.
fn take_image_format(body: &mut Map<String, Value>) -> Result<bool, ApiError> {
    let as_url = match body.get("response_format") {
        None | Some(Value::Null) => false,
        Some(Value::String(format)) if format == "b64_json" => false,
        Some(Value::String(format)) if format == "url" => true,
        Some(_) => return Err(ApiError::invalid("response_format", "response_format must be b64_json or url")),
    };
    body.insert("response_format".to_owned(), json!("b64_json"));
    Ok(as_url)
}

fn check_image_count(body: &Map<String, Value>) -> Result<(), ApiError> {
    match body.get("n") {
        None | Some(Value::Null) => Ok(()),
        Some(n) if n.as_u64().is_some_and(|n| (1..=IMAGES_MAX).contains(&n)) => Ok(()),
        Some(_) => Err(ApiError::invalid("n", format!("n must be a whole number from 1 to {IMAGES_MAX}"))),
    }
}

fn check_audio_format(body: &Map<String, Value>) -> Result<(), ApiError> {
    match body.get("response_format") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(format)) if AUDIO_FORMATS.contains(&format.as_str()) => Ok(()),
        Some(_) => {
            let message = format!("response_format must be one of {}", AUDIO_FORMATS.join(", "));
            Err(ApiError::invalid("response_format", message))
        }
    }
}

/// The worker is always asked for usage, so that the stored answer has it; says whether the caller asked, too.
fn ask_for_usage(body: &mut Map<String, Value>) -> Result<bool, ApiError> {
    let invalid = || ApiError::invalid("stream_options", "stream_options must be an object");
    let options = body.entry("stream_options").or_insert(Value::Null);
    if options.is_null() {
        *options = json!({});
    }
    let options = options.as_object_mut().ok_or_else(invalid)?;
    let asked = options.get("include_usage") == Some(&Value::Bool(true));
    options.insert("include_usage".to_owned(), Value::Bool(true));
    Ok(asked)
}

/// The endpoint of a `{kind: "custom", model, input}` submission: the model's main one.
pub fn main_endpoint(models: &Models, model: &str) -> Result<String, ApiError> {
    let spec = models.get(model)?;
    spec.endpoints.first().cloned().ok_or_else(|| {
        let kind: ModelKind = spec.kind;
        ApiError::invalid("model", format!("`{}` ({kind}) has no endpoint", spec.name))
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::domain::Launch;
    use std::time::Duration;

    /// A model that serves `endpoint`, for tests.
    pub fn spec(name: &str, kind: ModelKind, endpoints: &[&str]) -> ModelSpec {
        ModelSpec {
            name: name.to_owned(),
            kind,
            launch: Launch::Command(vec!["true".to_owned()]),
            model: None,
            revision: None,
            port: 8001,
            has_own_port: false,
            startup_time: Duration::from_secs(1),
            endpoints: endpoints.iter().map(|e| (*e).to_owned()).collect(),
            args: Vec::new(),
            env: BTreeMap::new(),
            aliases: vec![format!("{name}-latest")],
            limit: 4,
            max_batch: 1,
            first_batch: 1,
            timeout: Duration::from_secs(600),
            max_attempts: 3,
            idle_ttl: None,
            preload: false,
            gpus: 0,
            memory: None,
            max_replicas: 1,
            pin: false,
            exclusive: false,
            park: crate::domain::Park::Off,
            spare: false,
            upstream_model: format!("org/{name}"),
            dir: "/".into(),
        }
    }

    /// One of each kind.
    pub fn specs() -> Vec<ModelSpec> {
        vec![
            spec("text", ModelKind::Text, &[CHAT, COMPLETIONS]),
            spec("flux", ModelKind::Image, &["/v1/images/generations"]),
            spec("music", ModelKind::Audio, &[AUDIO, SPEECH]),
            spec("depth", ModelKind::Custom, &["/v1/depth"]),
        ]
    }

    fn sync(endpoint: &str, body: Value) -> Result<NewJob, ApiError> {
        let Value::Object(body) = body else { panic!("an object") };
        prepare(&Models::new(specs()), endpoint, body, Options::new("default".into(), Face::Sync, PRIORITY_SYNC))
    }

    fn forwarded(job: &NewJob) -> String {
        String::from_utf8(job.body.to_vec()).unwrap()
    }

    #[test]
    fn unknown_fields_go_to_the_worker_verbatim_and_in_order() {
        let body = json!({"zeta": {"b": 1, "a": [1.5, null]}, "model": "text-latest", "messages": [{"role": "user"}],
            "store": true, "user": "u", "metadata": {"run": "42"}, "service_tier": "flex", "top_k": 3, "background": false});
        let job = sync(CHAT, body).unwrap();
        assert_eq!(
            forwarded(&job),
            r#"{"zeta":{"b":1,"a":[1.5,null]},"model":"org/text","messages":[{"role":"user"}],"user":"u","top_k":3}"#
        );
        assert_eq!((job.model.as_str(), job.present.model.as_str()), ("text", "text-latest"));
        assert_eq!(job.metadata["run"], "42");
        assert_eq!((job.priority, job.present.service_tier.as_str()), (3, "flex"));
        assert!(!job.stream);
    }

    #[test]
    fn a_stream_always_asks_for_usage_and_remembers_whether_the_caller_did() {
        let chat = |options: Value| {
            sync(CHAT, json!({"model": "text", "messages": [{}], "stream": true, "stream_options": options}))
        };
        let asked = chat(json!({"include_usage": true, "continuous_usage_stats": true})).unwrap();
        assert!(asked.stream && asked.present.include_usage);
        let unasked = chat(Value::Null).unwrap();
        assert!(!unasked.present.include_usage);
        for job in [asked, unasked] {
            assert!(forwarded(&job).contains(r#""include_usage":true"#));
        }
        assert_eq!(chat(json!(3)).unwrap_err().param.as_deref(), Some("stream_options"));
    }

    #[test]
    fn images_are_checked_and_shown_as_asked() {
        let image = |more: Value| {
            let mut body = json!({"model": "flux", "prompt": "a cat", "background": "transparent"});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            sync("/v1/images/generations", body)
        };
        let job = image(json!({"response_format": "url", "n": 10})).unwrap();
        assert!(job.present.image_url);
        assert_eq!(
            forwarded(&job),
            r#"{"model":"org/flux","prompt":"a cat","background":"transparent","response_format":"b64_json","n":10}"#
        );
        let param = |more: Value| image(more).unwrap_err().param.clone().unwrap();
        assert_eq!(param(json!({"n": 11})), "n");
        assert_eq!(param(json!({"n": 1.5})), "n");
        assert_eq!(param(json!({"response_format": "png"})), "response_format");
        assert_eq!(image(json!({"stream": true})).unwrap_err().code, ErrorCode::UnsupportedParameter);
        assert_eq!(param(json!({"prompt": null})), "prompt");
    }

    #[test]
    fn audio_formats_are_checked_and_left_to_the_worker() {
        let speech = |format: &str| sync(SPEECH, json!({"model": "music", "input": "x", "response_format": format}));
        assert!(forwarded(&speech("opus").unwrap()).contains("opus"));
        let error = speech("aac").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("response_format"));
        assert!(error.message.contains("wav, flac, mp3, opus"));
    }

    #[test]
    fn models_that_are_not_there_or_serve_something_else_are_named() {
        let error = sync(CHAT, json!({"model": "txet", "messages": [{}]})).unwrap_err();
        assert_eq!(error.code, ErrorCode::ModelNotFound);
        assert!(error.message.contains("there are: text, "), "{}", error.message);
        let error = sync(CHAT, json!({"model": "flux", "messages": [{}]})).unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidRequest, Some("model")));
        assert!(error.message.contains("these do: text"), "{}", error.message);
        assert_eq!(sync(CHAT, json!({"messages": [{}]})).unwrap_err().param.as_deref(), Some("model"));
    }

    #[test]
    fn what_no_engine_could_run_is_refused_before_a_model_is_loaded() {
        for (endpoint, body, param) in [
            (CHAT, json!({"model": "text"}), "messages"),
            (CHAT, json!({"model": "text", "messages": []}), "messages"),
            (COMPLETIONS, json!({"model": "text"}), "prompt"),
            (SPEECH, json!({"model": "music"}), "input"),
            (AUDIO, json!({"model": "music"}), "prompt"),
            (CHAT, json!({"model": "text", "messages": [{}], "stream": "yes"}), "stream"),
            (CHAT, json!({"model": "text", "messages": [{}], "service_tier": "gold"}), "service_tier"),
            (CHAT, json!({"model": "text", "messages": [{}], "metadata": {"a": 1}}), "metadata"),
        ] {
            assert_eq!(sync(endpoint, body).unwrap_err().param.as_deref(), Some(param), "{endpoint} {param}");
        }
    }

    #[test]
    fn tiers_choose_the_priority() {
        let priority = |field: &str, value: Value| {
            sync(CHAT, json!({"model": "text", "messages": [{}], field: value})).unwrap().priority
        };
        assert_eq!(priority("service_tier", json!("priority")), 8);
        assert_eq!(priority("service_tier", json!("auto")), 7);
        assert_eq!(priority("service_tier", json!("flex")), 3);
        assert_eq!(priority("background", json!(true)), 1);
    }

    #[test]
    fn metadata_is_bounded() {
        let many: Map<String, Value> = (0..17).map(|n| (n.to_string(), json!("x"))).collect();
        assert!(metadata(&Value::Object(many)).is_err());
        assert!(metadata(&json!({"k".repeat(65): "x"})).is_err());
        assert!(metadata(&json!({"k": "x".repeat(513)})).is_err());
        assert_eq!(metadata(&json!({"k": "v"})).unwrap()["k"], "v");
    }
}
