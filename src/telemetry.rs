//! Logs: readable lines on stderr, or JSON with `ROUNDHOUSE_LOG_FORMAT=json`. Filter: `ROUNDHOUSE_LOG` (default `info`).
//! Prompts, outputs and keys are never logged; their lengths may be.

use std::io::IsTerminal as _;

use thiserror::Error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, ParseError};

/// What a server logs unless it is told.
pub const OF_A_SERVER: &str = "info,sqlx=warn,hyper=warn";
/// What other commands log unless they are told.
pub const OF_A_COMMAND: &str = "warn";
/// Parts of the program whose names are no typing errors.
const OURS: &str = "roundhouse";

/// Why a filter is refused.
#[derive(Debug, Error)]
pub enum FilterError {
    /// It would turn off everything but what is of a part of this name.
    #[error(
        "`{0}` is no level (error, warn, info, debug, trace or off); of a part of the program, say its level, as in `sqlx=debug`"
    )]
    NoLevel(String),
    /// It is no filter at all.
    #[error("`{part}` cannot be read ({source}); write `info`, or `info,roundhouse::scheduler=debug`")]
    Unreadable {
        /// What lies between two commas.
        part: String,
        /// What the library says.
        source: ParseError,
    },
}

/// Installs the subscriber; a filter without a word is `usual`. Called once, by main.
///
/// # Errors
///
/// The filter is refused; nothing is installed.
pub fn init(filter: Option<&str>, usual: &str, json: bool) -> Result<(), FilterError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(read(filter.unwrap_or_default(), usual)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second call (tests in one process) keeps the first subscriber.
    let installed = if json { builder.json().try_init() } else { builder.with_target(false).compact().try_init() };
    drop(installed);
    Ok(())
}

fn read(text: &str, usual: &str) -> Result<EnvFilter, FilterError> {
    // The library takes a space for a part of a name.
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    for part in &parts {
        // The library takes any word that is no level for the name of a part, and logs nothing else.
        let is_word = !part.contains(['=', '[']) && !part.starts_with(OURS);
        if is_word && part.parse::<LevelFilter>().is_err() {
            return Err(FilterError::NoLevel((*part).to_owned()));
        }
        EnvFilter::try_new(part).map_err(|source| FilterError::Unreadable { part: (*part).to_owned(), source })?;
    }
    let text = if parts.is_empty() { usual.to_owned() } else { parts.join(",") };
    EnvFilter::try_new(&text).map_err(|source| FilterError::Unreadable { part: text, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_parts_are_read_and_a_mistyped_level_is_refused() {
        let refused = |text: &str| read(text, OF_A_SERVER).unwrap_err().to_string();
        for text in ["inof", "info,debgu", "sqlx", "wran,roundhouse=info"] {
            assert!(refused(text).contains("is no level (error, warn, info, debug, trace or off)"), "{text}");
        }
        for text in ["foo=bar=baz", "roundhouse=inof", "info,=", "[a{b"] {
            assert!(refused(text).contains("cannot be read"), "{text}");
        }
        for (text, taken) in [
            ("info", "info"),
            ("INFO", "info"),
            ("off", "off"),
            ("roundhouse", "roundhouse=trace"),
            ("roundhouse::store", "roundhouse::store=trace"),
            (" warn , sqlx=debug,", "sqlx=debug,warn"),
            ("", "sqlx=warn,hyper=warn,info"),
        ] {
            let mut parts: Vec<String> =
                read(text, OF_A_SERVER).unwrap().to_string().split(',').map(str::to_owned).collect();
            let mut wanted: Vec<&str> = taken.split(',').collect();
            parts.sort();
            wanted.sort_unstable();
            assert_eq!(parts, wanted, "{text:?}");
        }
    }
}
