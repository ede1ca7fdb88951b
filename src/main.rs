//! Parses flags and calls the library; nothing else.

use std::process::ExitCode;

/// Only `guard --grace-ms N -- COMMAND...` so far.
fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [verb, flag, grace, dashes, command @ ..] = words.as_slice() else {
        return ExitCode::from(2);
    };
    if verb != "guard" || flag != "--grace-ms" || dashes != "--" {
        return ExitCode::from(2);
    }
    let Ok(grace_ms) = grace.parse() else {
        return ExitCode::from(2);
    };
    let code = roundhouse::worker::guard::run(grace_ms, command.to_vec());
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
