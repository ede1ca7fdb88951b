//! `roundhouse queue`: pause, resume, drain and purge by hand.

use std::io::Write;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::api::Server;
use super::counted;
use crate::domain::resume_command;

/// Posts `word` about one model or all, and says what holds now.
pub(super) async fn operate(
    server: &Server,
    word: &str,
    model: Option<&str>,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let body = model.map_or_else(|| json!({}), |model| json!({"model": model}));
    let answer = server.post_json(&format!("/v1/queue/{word}"), &body).await?;
    let whose = model.unwrap_or("all models");
    let text = match word {
        "pause" => {
            let resume = resume_command(whose, model.is_none());
            format!("{whose}: paused; what runs goes on, and `{resume}` lets the others start")
        }
        "drain" => format!(
            "{whose}: new jobs are refused; {} wait and {} run still{}",
            sum(&answer, model, "queued"),
            sum(&answer, model, "running"),
            if answer["paused"] == true {
                "; those that wait are paused with all models until `roundhouse queue resume`"
            } else {
                ""
            }
        ),
        "purge" => {
            format!("{whose}: {} cancelled", counted(answer["removed"].as_u64().unwrap_or_default(), "waiting job"))
        }
        _ => match (answer["paused"] == true, answer["draining"] == true) {
            (false, false) if let Some(trouble) = trouble(&answer, model) => {
                format!("{whose}: not held by hand any more; {trouble}")
            }
            (false, false) => format!("{whose}: jobs are accepted and start"),
            (paused, _) => format!(
                "{whose}: still {}, since all models are; `roundhouse queue resume` without --model ends that",
                if paused { "paused" } else { "drained, new jobs are refused" }
            ),
        },
    };
    writeln!(out, "{text}")?;
    Ok(ExitCode::SUCCESS)
}

/// Why a model cannot be loaded now.
fn trouble<'a>(queue: &'a Value, model: Option<&str>) -> Option<&'a str> {
    let mut models = queue["models"].as_array()?.iter();
    models.find(|view| view["model"].as_str() == model)?["trouble"].as_str()
}

/// A figure of the queue, of one model or of all.
fn sum(queue: &Value, model: Option<&str>, field: &str) -> u64 {
    let models = queue["models"].as_array().into_iter().flatten();
    models.filter(|view| model.is_none_or(|model| view["model"] == model)).filter_map(|view| view[field].as_u64()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_one_model_or_of_all() {
        let queue = json!({"models": [{"model": "a", "queued": 2}, {"model": "b", "queued": 3}]});
        assert_eq!((sum(&queue, Some("a"), "queued"), sum(&queue, None, "queued")), (2, 5));
        let queue = json!({"models": [{"model": "a", "trouble": null}, {"model": "b", "trouble": "it is gone"}]});
        assert_eq!((trouble(&queue, Some("a")), trouble(&queue, Some("b"))), (None, Some("it is gone")));
        assert_eq!(trouble(&queue, None), None);
    }
}
