//! `GET /v1/queue/decisions`: what the scheduler decided, and why.

use axum::Json;
use axum::extract::{OriginalUri, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::http::body::{self, unknown_field};
use crate::http::error::ApiError;
use crate::http::{AppState, ops};
use crate::scheduler::handle::{DecisionFilter, DecisionPage};

/// Decisions that are shown, if it is not said, and at most.
const LIMIT_DEFAULT: u64 = 100;
const LIMIT_MAX: u64 = 1_000;

/// `GET /v1/queue/decisions?model=&limit=&after=`, newest first.
pub async fn list(State(state): State<AppState>, OriginalUri(uri): OriginalUri) -> Result<Response, ApiError> {
    let mut filter = filter(&uri)?;
    let asked = filter.model.clone();
    // A model that was taken out has its own decisions still, whose alias its name may be now.
    let is_known = |name: &str| state.handle.queue().models.iter().any(|view| view.model == name);
    let entry =
        asked.filter(|name| !is_known(name)).map(|name| Ok::<_, ApiError>(state.models().get(&name)?.name.clone()));
    if let Some(Ok(name)) = &entry {
        filter.model = Some(name.clone());
    }
    let is_first = filter.after.is_none();
    let page = state.handle.decisions(filter).await;
    match entry {
        Some(Err(unknown)) if is_first && page.decisions.is_empty() => Err(unknown),
        _ => Ok(Json(page_json(&page)).into_response()),
    }
}

fn filter(uri: &Uri) -> Result<DecisionFilter, ApiError> {
    const FIELDS: [&str; 3] = ["model", "limit", "after"];
    let query = body::query(uri)?;
    if let Some((name, _)) = query.iter().find(|(name, _)| !FIELDS.contains(&name.as_str())) {
        return Err(unknown_field(name, &FIELDS));
    }
    let limit = body::number(&query, "limit")?.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("limit must be from 1 to {LIMIT_MAX}, not {limit}")));
    }
    let model = body::field(&query, "model").filter(|model| !model.is_empty()).map(str::to_owned);
    let limit = usize::try_from(limit).unwrap_or(1);
    Ok(DecisionFilter { after: body::number(&query, "after")?, model, limit })
}

fn page_json(page: &DecisionPage) -> Value {
    let data = page.decisions.iter().map(|(id, decision)| {
        let mut shown = ops::decision_json(decision);
        if let Value::Object(fields) = &mut shown {
            fields.shift_insert(0, "id".to_owned(), json!(id));
        }
        shown
    });
    json!({
        "object": "list",
        "first_id": page.decisions.first().map(|(id, _)| id),
        "last_id": page.decisions.last().map(|(id, _)| id),
        "has_more": page.has_more,
        "data": data.collect::<Vec<Value>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_which() {
        let read = |text: &str| filter(&format!("/v1/queue/decisions{text}").parse().unwrap());
        assert_eq!(read("").unwrap(), DecisionFilter { after: None, model: None, limit: 100 });
        let all = read("?model=org%2Fm&limit=1000&after=7").unwrap();
        assert_eq!(all, DecisionFilter { after: Some(7), model: Some("org/m".into()), limit: 1_000 });
        assert_eq!(read("?limit=0").unwrap_err().message, "limit must be from 1 to 1000, not 0");
        assert!(read("?limit=1001").is_err() && read("?after=x").is_err() && read("?modle=a").is_err());
    }
}
