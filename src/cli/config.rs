//! `roundhouse config schema` and `roundhouse config check`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use super::environment;
use crate::config;
use crate::domain::{Launch, ModelSpec};

/// Prints the JSON Schema of the model file.
pub(super) fn schema(out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    out.write_all(config::schema().as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Checks a file; prints one line a model, with what is not installed yet. A refused file is an error.
pub(super) fn check(path: &Path, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let config = config::load(path, &environment)?;
    for spec in &config.models {
        let lacks = lack(spec).map(|lack| format!("; {lack}")).unwrap_or_default();
        writeln!(out, "{}: {}, port {}, {}{lacks}", spec.name, spec.kind, spec.port, spec.endpoints.join(" "))?;
    }
    writeln!(out, "{}: ok, {} models", path.display(), config.models.len())?;
    Ok(ExitCode::SUCCESS)
}

/// What has to be done before the model can load, as far as a look at the disk tells.
fn lack(spec: &ModelSpec) -> Option<String> {
    if let Some(command) = install_command(spec) {
        return Some(format!("not installed: {command}"));
    }
    let folder = spec.model.as_ref().filter(|model| model.starts_with('/'))?;
    (!Path::new(folder).exists()).then(|| format!("no weights in {folder}"))
}

/// The command that makes the model's interpreter, if that is missing.
pub(super) fn install_command(spec: &ModelSpec) -> Option<String> {
    let Launch::Script { python, .. } = &spec.launch else {
        return None;
    };
    // A bare name is looked up in PATH at start.
    let is_there = python.components().count() == 1 || python.exists();
    (!is_there).then(|| format!("roundhouse models install {}", spec.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("models/echo");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("server.py"), "").unwrap();
        let path = dir.path().join("models.yaml");
        std::fs::write(
            &path,
            "models:\n  a: {type: text, service_script: models/echo/server.py}\n  b: {type: text, command: x, model: ./weights}\n  c: {type: text, command: x}\n",
        )
        .unwrap();
        let mut out = Vec::new();
        check(&path, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("; not installed: roundhouse models install a"), "{text}");
        assert!(lines[1].contains("; no weights in /"), "{text}");
        assert_eq!(lines[2], "c: text, port 8003, /v1/chat/completions /v1/completions");
        assert!(lines[3].ends_with(": ok, 3 models"), "{text}");
    }

    #[test]
    fn a_refused_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models.yaml");
        std::fs::write(&path, "modles: {}\n").unwrap();
        let error = check(&path, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("did you mean `models`?"), "{error}");
    }
}
