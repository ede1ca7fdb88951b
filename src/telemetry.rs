//! Logs: readable lines on stderr, or JSON with `ROUNDHOUSE_LOG_FORMAT=json`. Filter: `ROUNDHOUSE_LOG` (default `info`).
//! Prompts, outputs and keys are never logged; their lengths may be.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Installs the subscriber. Called once, by main.
pub fn init(filter: Option<&str>, json: bool) {
    let filter =
        EnvFilter::try_new(filter.unwrap_or("info,sqlx=warn,hyper=warn")).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second call (tests in one process) keeps the first subscriber.
    let installed = if json { builder.json().try_init() } else { builder.with_target(false).compact().try_init() };
    drop(installed);
}
