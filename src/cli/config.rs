//! `roundhouse config schema` and `roundhouse config check`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use super::{counted, environment};
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
        let notes: String = notes(spec).iter().map(|note| format!("; {note}")).collect();
        writeln!(out, "{}: {}, port {}, {}{notes}", spec.name, spec.kind, spec.port, spec.endpoints.join(" "))?;
    }
    writeln!(out, "{}: ok, {}", path.display(), counted(config.models.len() as u64, "model"))?;
    Ok(ExitCode::SUCCESS)
}

/// What has to be done before the model can load, as far as a look at the disk tells, and what is hardly meant.
fn notes(spec: &ModelSpec) -> Vec<String> {
    let mut notes = Vec::new();
    match python_advice(spec) {
        Some(advice) if is_own(spec) => notes.push(format!("not installed: {advice}")),
        Some(advice) => notes.push(advice),
        None => {}
    }
    if let Launch::Command(words) = &spec.launch {
        notes.extend(words.first().and_then(|program| no_program(program, &spec.dir)));
        if !spec.tells_port() {
            notes.push("its `command` has no {port}, so it does not know where it has to listen".to_owned());
        }
        if spec.revision.is_some() {
            notes.push("a `command` is not told the `revision`".to_owned());
        }
    }
    let folder = spec.model.as_ref().filter(|model| model.starts_with('/'));
    notes.extend(folder.filter(|folder| !Path::new(folder).exists()).map(|folder| format!("no weights in {folder}")));
    if spec.park.is_on() && spec.pin {
        notes.push("pinned, so it is parked only after `roundhouse models unpin`".to_owned());
    }
    notes
}

/// That a program is not there, neither in the folder that it is started in nor in `PATH`.
fn no_program(program: &str, dir: &Path) -> Option<String> {
    let is_there = if program.contains('/') {
        dir.join(program).exists()
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    };
    (!is_there).then(|| format!("there is no program {program}"))
}

/// What to do about its interpreter, if that is missing: the command that makes it, if it is its own.
pub(super) fn python_advice(spec: &ModelSpec) -> Option<String> {
    let advice = spec.launch.without_python(&spec.name)?;
    Some(if is_own(spec) { format!("roundhouse models install {}", spec.name) } else { advice })
}

/// Whether its interpreter is that of the environment which `roundhouse models install` makes.
pub(super) fn is_own(spec: &ModelSpec) -> bool {
    matches!(&spec.launch, Launch::Script { python, script } if *python == Launch::own_python(script))
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
            "models:\n  a: {type: text, service_script: models/echo/server.py}\n  b: {type: text, command: x, model: ./weights}\n  c: {type: text, command: 'sh {port}'}\n  d: {type: text, service_script: models/echo/server.py, python: /nope/python, park: ram, pin: true}\n",
        )
        .unwrap();
        let mut out = Vec::new();
        check(&path, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("; not installed: roundhouse models install a"), "{text}");
        assert!(lines[1].contains("; no weights in /"), "{text}");
        assert!(lines[1].contains("; there is no program x; its `command` has no {port}"), "{text}");
        assert_eq!(lines[2], "c: text, port 8003, /v1/chat/completions /v1/completions");
        assert!(lines[3].contains("; `python` names /nope/python, which is not there; make"), "{text}");
        assert!(lines[3].contains("; pinned, so it is parked only after"), "{text}");
        assert!(lines[4].ends_with(": ok, 4 models"), "{text}");
    }

    #[test]
    fn a_folder_and_a_tilde_are_no_interpreters() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("env/bin")).unwrap();
        std::fs::create_dir(dir.path().join("bare")).unwrap();
        ["server.py", "env/bin/python"].iter().for_each(|file| std::fs::write(dir.path().join(file), "").unwrap());
        let all = [("a", "env/bin/python"), ("b", "./env"), ("c", "bare/"), ("d", "~/env/bin/python")];
        let entry = |(name, python)| format!("  {name}: {{type: text, service_script: server.py, python: {python}}}\n");
        let path = dir.path().join("models.yaml");
        std::fs::write(&path, format!("models:\n{}", all.map(entry).concat())).unwrap();
        let mut out = Vec::new();
        check(&path, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(!lines[0].contains("`python`"), "{text}");
        assert!(
            lines[1].contains("which is a folder; did you mean ") && lines[1].contains("/env/bin/python?"),
            "{text}"
        );
        assert!(lines[2].contains("which is a folder; name the interpreter"), "{text}");
        assert!(lines[3].contains("~ is not expanded, write the whole path"), "{text}");
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
