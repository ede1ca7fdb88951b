//! `roundhouse models list`, and what is done to models by hand.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use serde_json::Value;

use super::api::Server;

/// Prints one line a model: name, type, state, queue, endpoint; and the reason below a model in trouble.
pub(super) async fn list(server: &Server, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let models = server.get("/v1/models").await?;
    let workers = server.get("/v1/workers").await?;
    out.write_all(table(&models, &workers).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the server to load a model again.
pub(super) async fn retry(server: &Server, name: &str, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    server.post(&format!("/v1/models/{name}/retry")).await?;
    writeln!(out, "{name}: will be tried again when it has work; `roundhouse models list` shows how it goes")?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the server to load, unload, pin or unpin a model.
pub(super) async fn operate(server: &Server, word: &str, name: &str, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    server.post(&format!("/v1/models/{name}/{word}")).await?;
    let text = match word {
        "load" => "is due now, and is loaded as soon as others make room; `roundhouse models list` shows how it goes",
        "unload" => {
            "stops when its running jobs have ended, or at once if it loads or its weights are fetched; jobs that wait bring it back \
             unless it is paused"
        }
        "pin" => "is not displaced by other models any more, once it is loaded",
        _ => "may be displaced by other models",
    };
    writeln!(out, "{name}: {text}")?;
    Ok(ExitCode::SUCCESS)
}

const HEAD: [&str; 6] = ["MODEL", "TYPE", "STATE", "QUEUED", "PORT", "ENDPOINTS"];

struct Row {
    cells: [String; 6],
    reason: Option<String>,
}

fn table(models: &Value, workers: &Value) -> String {
    // Of several workers the first that there is.
    let mut by_model: BTreeMap<&str, &Value> = BTreeMap::new();
    for worker in items(workers) {
        let Some(model) = worker.get("model").and_then(Value::as_str) else { continue };
        let known = by_model.entry(model).or_insert(worker);
        if known.get("state").is_some_and(|state| state == "absent") {
            *known = worker;
        }
    }
    let gone = models.pointer("/roundhouse/removed").and_then(Value::as_array).into_iter().flatten().map(removed_row);
    let rows: Vec<Row> = items(models).map(|model| row(model, &by_model)).chain(gone).collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = line(&HEAD.map(str::to_owned), &widths);
    for row in &rows {
        text += &line(&row.cells, &widths);
        if let Some(reason) = &row.reason {
            for part in reason.lines() {
                text += &format!("    {part}\n");
            }
        }
    }
    text
}

fn row(model: &Value, workers: &BTreeMap<&str, &Value>) -> Row {
    let id = model.get("id").map(word).unwrap_or_default();
    let ours = model.get("roundhouse").unwrap_or(&Value::Null);
    let worker = workers.get(id.as_str()).copied().unwrap_or(&Value::Null);
    let endpoints = ours.get("endpoints").and_then(Value::as_array);
    let endpoints: Vec<String> = endpoints.into_iter().flatten().map(word).collect();
    let cells = [
        id,
        ours.get("kind").map(word).unwrap_or_default(),
        state(ours, worker),
        ours.get("queue_depth").map(word).unwrap_or_default(),
        worker.get("port").map(word).unwrap_or_default(),
        endpoints.join(" "),
    ];
    let reason = worker.get("reason").filter(|reason| reason.is_string()).or(ours.pointer("/fetch/reason"));
    Row { cells, reason: reason.and_then(Value::as_str).map(str::to_owned) }
}

/// A model without an entry whose jobs are still there.
fn removed_row(model: &Value) -> Row {
    let of = |key: &str| model.get(key).map(word).unwrap_or_default();
    let cells = [of("id"), String::new(), "removed".to_owned(), of("queue_depth"), String::new(), String::new()];
    Row { cells, reason: model.get("trouble").and_then(Value::as_str).map(str::to_owned) }
}

/// `loading weights 40%`, `fetching 33%, 100 s left`; the worker's view if there is one.
fn state(model: &Value, worker: &Value) -> String {
    let mut state = worker.get("state").or(model.get("state")).map(word).unwrap_or_default();
    if !matches!(state.as_str(), "loading" | "fetching") {
        return state;
    }
    if let Some(phase) = worker.get("phase").and_then(Value::as_str).filter(|phase| *phase != state) {
        state += &format!(" {phase}");
    }
    if let Some(percent) = worker.get("percent").and_then(Value::as_f64) {
        state += &format!(" {percent:.0}%");
    }
    if let Some(left) = model.pointer("/fetch/eta_s").and_then(Value::as_f64) {
        state += &format!(", {left:.0} s left");
    }
    state
}

/// The `data` of a list.
fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.get("data").and_then(Value::as_array).into_iter().flatten()
}

/// A value as a cell: texts without quotes, null as nothing.
fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn line(cells: &[String; 6], widths: &[usize; 6]) -> String {
    let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
    format!("{}\n", padded.join("  ").trim_end())
}

#[cfg(test)]
mod tests {
    use axum::extract::Path;
    use axum::http::{HeaderMap, StatusCode};
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use serde_json::json;

    use super::*;
    use crate::lifecycle::Tasks;

    fn models_json() -> Value {
        json!({"object": "list", "data": [
            {"id": "qwen", "object": "model", "roundhouse":
                {"kind": "text", "state": "loading", "queue_depth": 12, "endpoints": ["/v1/chat/completions", "/v1/completions"]}},
            {"id": "new", "object": "model", "roundhouse":
                {"kind": "text", "state": "fetching", "queue_depth": 1, "endpoints": ["/v1/completions"],
                    "fetch": {"eta_s": 100.0, "reason": "no byte has come"}}},
            {"id": "flux", "object": "model", "roundhouse":
                {"kind": "image", "state": "absent", "queue_depth": 0, "endpoints": ["/v1/images/generations"]}},
        ], "roundhouse": {"removed": [{"id": "old", "queue_depth": 3, "running": 0, "trouble": "add it back"}]}})
    }

    fn workers_json() -> Value {
        json!({"object": "list", "data": [
            {"model": "qwen", "replica": 0, "state": "absent", "port": null, "reason": null},
            {"model": "qwen", "replica": 1, "state": "loading", "phase": "weights", "percent": 40.2, "port": 8001, "reason": null},
            {"model": "new", "state": "fetching", "phase": "fetching", "percent": 33.3, "port": null, "reason": null},
            {"model": "flux", "state": "quarantined", "phase": null, "port": null, "reason": "5 loads failed\nno such file"},
        ]})
    }

    /// A server with a key and what it answers; its address.
    async fn stand_in(tasks: &Tasks) -> String {
        fn allowed(headers: &HeaderMap) -> Result<(), StatusCode> {
            let key = headers.get("authorization").and_then(|value| value.to_str().ok());
            (key == Some("Bearer secret")).then_some(()).ok_or(StatusCode::UNAUTHORIZED)
        }
        let app = Router::new()
            .route(
                "/v1/models",
                get(|headers: HeaderMap| async move { allowed(&headers).map(|()| Json(models_json())) }),
            )
            .route(
                "/v1/workers",
                get(|headers: HeaderMap| async move { allowed(&headers).map(|()| Json(workers_json())) }),
            )
            .route(
                "/v1/models/{name}/retry",
                post(|Path(name): Path<String>| async move {
                    match name.as_str() {
                        "flux" => Ok(Json(json!({}))),
                        _ => Err((
                            StatusCode::NOT_FOUND,
                            Json(json!({"error": {"message": "there is no model `nope`", "code": "model_not_found"}})),
                        )),
                    }
                }),
            );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let soft = tasks.soft().clone();
        tasks.spawn("stand-in", async move {
            axum::serve(listener, app).with_graceful_shutdown(soft.cancelled_owned()).await.unwrap();
        });
        format!("http://{address}")
    }

    #[tokio::test]
    async fn a_list_shows_states_queues_and_reasons() {
        let tasks = Tasks::new();
        let base = stand_in(&tasks).await;
        let server = Server::new(&base, Some("secret".into())).unwrap();
        let mut out = Vec::new();
        list(&server, &mut out).await.unwrap();
        let expected = "\
MODEL  TYPE   STATE                     QUEUED  PORT  ENDPOINTS
qwen   text   loading weights 40%       12      8001  /v1/chat/completions /v1/completions
new    text   fetching 33%, 100 s left  1             /v1/completions
    no byte has come
flux   image  quarantined               0             /v1/images/generations
    5 loads failed
    no such file
old           removed                   3
    add it back
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[tokio::test]
    async fn a_missing_key_is_said() {
        let tasks = Tasks::new();
        let base = stand_in(&tasks).await;
        let server = Server::new(&base, None).unwrap();
        let error = list(&server, &mut Vec::new()).await.unwrap_err().to_string();
        assert!(error.contains("ROUNDHOUSE_API_KEY"), "{error}");
    }

    #[tokio::test]
    async fn a_retry_says_what_the_server_says() {
        let tasks = Tasks::new();
        let base = stand_in(&tasks).await;
        let server = Server::new(&base, None).unwrap();
        let mut out = Vec::new();
        retry(&server, "flux", &mut out).await.unwrap();
        assert!(String::from_utf8(out).unwrap().starts_with("flux: will be tried again"));
        let error = retry(&server, "nope", &mut Vec::new()).await.unwrap_err().to_string();
        assert!(error.contains("404") && error.contains("there is no model `nope`"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_said() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let server = Server::new(&base, None).unwrap();
        let error = list(&server, &mut Vec::new()).await.unwrap_err().to_string();
        assert!(error.contains("is `roundhouse serve` running there?"), "{error}");
        assert!(Server::new("https://x", None).is_err());
    }
}
