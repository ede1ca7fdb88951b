//! Holds the direction of imports: who may name whom among our modules, and that SQL stays in the store, in tests too.
//!
//! Reads the source as text: what stands behind `#[cfg(test)]`, in `tests.rs` and in `*_tests.rs` is free, and so are
//! comments and texts in quotes.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Whom each module may import, besides itself. A path with more parts allows only that part of a module.
const LAYERS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    // The unit of its readings.
    ("clock", &["domain::Millis"]),
    ("policy", &["domain"]),
    ("config", &["domain", "policy"]),
    ("store", &["domain", "clock"]),
    ("lifecycle", &["clock"]),
    ("telemetry", &["clock"]),
    ("worker", &["domain", "clock", "lifecycle"]),
    ("scheduler", &["domain", "policy", "store", "worker", "clock", "lifecycle"]),
    // What the state machine's events and effects carry, and nothing of the store or of workers themselves.
    (
        "sim",
        &["domain", "policy", "scheduler::state", "store::Learned", "store::QueuedJob", "worker::supervisor::Order"],
    ),
    (
        "http",
        &[
            "domain",
            "store",
            "scheduler::handle",
            "scheduler::hub",
            "lifecycle",
            "telemetry",
            "clock",
            "config::ServerSettings",
        ],
    ),
    // Commands about a data dir work without a server; they use the store's views from outside, never its verbs.
    (
        "cli",
        &[
            "domain",
            "policy::Knobs",
            "config",
            "store::StoreError",
            "store::backup",
            "store::restore",
            "store::examine",
            "store::placement",
            "sim",
            "clock",
        ],
    ),
];

/// The composition root and the crate's own files may name everything.
const FREE: &[&str] = &["app", "main", "lib"];

/// Marks of SQL, looked for in the code with its texts.
const SQL: &[&str] = &["SELECT ", "INSERT INTO ", "DELETE FROM ", "CREATE TABLE ", "PRAGMA ", "BEGIN IMMEDIATE"];

/// A source file and the module of the crate that it belongs to.
struct Source {
    path: PathBuf,
    module: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for path in rust_files(&root).into_iter().filter(|path| !is_test_file(path)) {
        let inside = path.strip_prefix(&root).unwrap();
        let first = inside.components().next().unwrap().as_os_str().to_string_lossy();
        let module = first.trim_end_matches(".rs").to_owned();
        found.push(Source { text: std::fs::read_to_string(&path).unwrap(), path, module });
    }
    found
}

/// Rust files in a folder and those below it.
fn rust_files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

fn is_test_file(path: &Path) -> bool {
    let stem = path.file_stem().unwrap().to_string_lossy();
    stem == "tests" || stem.ends_with("_tests")
}

/// Without comments and without what stands behind `#[cfg(test)]`. Texts in quotes stay if `texts` says so.
fn code(text: &str, texts: bool) -> String {
    without_tests(&without_comments(text, texts))
}

fn without_comments(text: &str, texts: bool) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let end = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(end) = literal_end(rest) {
            if texts {
                out.push_str(&rest[..end]);
            } else {
                out.push_str("\"\"");
            }
            end
        } else {
            out.push(next);
            next.len_utf8()
        };
        rest = &rest[end..];
    }
    out
}

/// Where the text in quotes (plain or raw) or the character that begins here ends.
fn literal_end(rest: &str) -> Option<usize> {
    for quote in ["'\"'", "'\\\"'", "'\\''", "'\\\\'", "'{'", "'}'"] {
        if rest.starts_with(quote) {
            return Some(quote.len());
        }
    }
    for hashes in ["##", "#"] {
        if rest.starts_with(&format!("r{hashes}\"")) {
            let close = format!("\"{hashes}");
            let begin = 2 + hashes.len();
            return Some(rest[begin..].find(&close).map_or(rest.len(), |end| begin + end + close.len()));
        }
    }
    let inside = rest.strip_prefix('"')?;
    let mut escaped = false;
    for (index, character) in inside.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(index + 2),
            _ => {}
        }
    }
    Some(rest.len())
}

/// Drops the item behind each `#[cfg(test)]`: up to its closing brace, or its semicolon if that comes first.
fn without_tests(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(begin) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..begin]);
        rest = &rest[begin..];
        let mut depth = 0_usize;
        let end = rest.char_indices().find_map(|(index, character)| {
            match character {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            (depth == 0 && matches!(character, '}' | ';')).then_some(index + 1)
        });
        rest = &rest[end.unwrap_or(rest.len())..];
    }
    out + rest
}

/// All paths of this crate that a file names, as `store::writer`: `crate::a::b`, groups taken apart, and `super::` that
/// leads out of the module.
fn paths(source: &Source) -> BTreeSet<String> {
    let code: String = code(&source.text, false);
    let mut found = BTreeSet::new();
    for start in ["crate::", "roundhouse::"] {
        for (index, _) in code.match_indices(start) {
            let before = code[..index].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            expand(&code[index + start.len()..], "", &mut found);
        }
    }
    for (index, _) in code.match_indices("super::") {
        if code[..index].ends_with("::") {
            continue;
        }
        let mut rest = &code[index..];
        let mut levels = 0;
        while let Some(next) = rest.strip_prefix("super::") {
            rest = next;
            levels += 1;
        }
        if levels > depth(source) {
            expand(rest, "", &mut found);
        }
    }
    found
}

/// How many `super::` stay inside the file's module: `store/mod.rs` none, `store/read.rs` one, `http/openai/mod.rs` one.
fn depth(source: &Source) -> usize {
    let folders = source.path.components().rev().skip(1).take_while(|part| part.as_os_str() != "src").count();
    folders - usize::from(source.path.ends_with("mod.rs") && folders > 0)
}

/// `a::{b, c::d}` -> a::b, a::c::d. Reads up to the end of the path.
fn expand(text: &str, prefix: &str, found: &mut BTreeSet<String>) {
    let text = text.trim_start();
    if let Some(group) = text.strip_prefix('{') {
        for part in parts(group) {
            expand(part, prefix, found);
        }
        return;
    }
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    let name = &text[..end];
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    match text[end..].strip_prefix("::") {
        Some(rest) if !name.is_empty() => expand(rest, &path, found),
        _ => drop(found.insert(path)),
    }
}

/// The parts of a group up to its closing brace, split at its own commas.
fn parts(group: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut begin) = (Vec::new(), 0_usize, 0);
    for (index, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => {
                parts.push(&group[begin..index]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[begin..index]);
                begin = index + 1;
            }
            _ => {}
        }
    }
    parts.retain(|part| !part.trim().is_empty());
    parts
}

/// What a file of `module` may not name, among `paths`.
fn forbidden<'a>(module: &str, paths: &'a BTreeSet<String>) -> Vec<&'a str> {
    if FREE.contains(&module) {
        return Vec::new();
    }
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
        return paths.iter().map(String::as_str).collect();
    };
    let may = |path: &str| {
        let first = path.split("::").next().unwrap_or_default();
        let is_module = LAYERS.iter().any(|(name, _)| *name == first) || FREE.contains(&first);
        // Macros and items at the root of the crate are nobody's layer.
        !is_module || first == module || allowed.iter().any(|allowed| covers(allowed, path))
    };
    paths.iter().map(String::as_str).filter(|path| !may(path)).collect()
}

fn covers(allowed: &str, path: &str) -> bool {
    path == allowed || path.strip_prefix(allowed).is_some_and(|rest| rest.starts_with("::"))
}

#[test]
fn imports_point_in_one_direction() {
    let mut wrong = Vec::new();
    for source in sources() {
        for path in forbidden(&source.module, &paths(&source)) {
            wrong.push(format!("{}: {} may not import crate::{path}", source.path.display(), source.module));
        }
    }
    assert!(wrong.is_empty(), "{}\n(the table is LAYERS in tests/architecture.rs)", wrong.join("\n"));
}

#[test]
fn every_module_has_a_layer() {
    let modules: BTreeSet<String> = sources().into_iter().map(|source| source.module).collect();
    let known: BTreeSet<String> =
        LAYERS.iter().map(|(name, _)| *name).chain(FREE.iter().copied()).map(str::to_owned).collect();
    assert_eq!(modules, known);
}

/// The words of SQL that stand in a file.
fn sql(text: &str) -> Vec<&'static str> {
    let with_texts = code(text, true);
    let bare = code(text, false);
    let crates = ["sqlx::", "rusqlite::"].into_iter().filter(|name| bare.contains(name));
    SQL.iter().copied().filter(|word| with_texts.contains(word)).chain(crates).collect()
}

#[test]
fn sql_stays_in_the_store() {
    for source in sources().iter().filter(|source| source.module != "store") {
        let found = sql(&source.text);
        assert!(found.is_empty(), "{}: {found:?} belongs into src/store", source.path.display());
    }
    // Tests outside of the crate see the store by its verbs, as everybody does. This file names what it looks for.
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for path in rust_files(&tests).iter().filter(|path| !path.ends_with("architecture.rs")) {
        let found = sql(&std::fs::read_to_string(path).unwrap());
        assert!(found.is_empty(), "{}: {found:?} belongs into src/store", path.display());
    }
    let in_store =
        sources().iter().filter(|source| source.module == "store").any(|source| !sql(&source.text).is_empty());
    assert!(in_store, "the marks find nothing in the store either, so they are of no use");
}

/// The tests that docs/FAULTS.md names, by the last column of its table.
fn tests_named(table: &str) -> Vec<&str> {
    let rows = table.lines().filter(|line| {
        line.starts_with("| ") && !line.starts_with("| fault") && !line.starts_with("| rule") && !line.contains("| ---")
    });
    let last = rows.filter_map(|row| row.trim_end_matches(['|', ' ']).rsplit('|').next());
    last.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn each_fault_is_shown_by_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = std::fs::read_to_string(root.join("docs/FAULTS.md")).unwrap();
    let mut texts: Vec<String> = ["tests", "src"]
        .iter()
        .flat_map(|folder| rust_files(&root.join(folder)))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    for entry in std::fs::read_dir(root.join("tests/engines")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "py") {
            texts.push(std::fs::read_to_string(path).unwrap());
        }
    }
    let named = tests_named(&table);
    assert!(named.len() > 40, "the table is read: {named:?}");
    let exists = |name: &str| {
        let (rust, python) = (format!("fn {name}()"), format!("def {name}("));
        texts.iter().any(|text| text.contains(&rust) || text.contains(&python))
    };
    let missing: Vec<&str> = named.into_iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "docs/FAULTS.md names tests that are not there: {missing:?}");
}

// ---- the reader itself ---------------------------------------------------------

fn named(path: &str, text: &str) -> Vec<String> {
    let path = PathBuf::from(path);
    let module = path.components().nth(1).unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
    paths(&Source { path, module, text: text.to_owned() }).into_iter().collect()
}

#[test]
fn the_reader_finds_imports() {
    let text = r#"
        use crate::domain::{Job, job::{JobState, Token as T}, error};
        use crate::{clock::Clock, store};
        pub(crate) use text_enum;
        fn f() -> crate::policy::Knobs { "crate::http::x"; 'a'; '"'; crate::worker::go() } // crate::cli::x
        /* crate::app */
        #[cfg(test)]
        use crate::lifecycle::Tasks;
        #[cfg(test)]
        mod tests { use crate::http::y; fn a() { if true {} } }
        use crate::config::Config;
    "#;
    assert_eq!(
        named("src/store/read.rs", text),
        [
            "clock::Clock",
            "config::Config",
            "domain::Job",
            "domain::error",
            "domain::job::JobState",
            "domain::job::Token",
            "policy::Knobs",
            "store",
            "worker::go",
        ]
    );
}

#[test]
fn the_reader_follows_super_out_of_the_module() {
    assert_eq!(named("src/store/read.rs", "use super::{Store, writer::Writer};"), Vec::<String>::new());
    assert_eq!(named("src/store/read.rs", "use super::super::worker::X;"), ["worker::X"]);
    assert_eq!(named("src/store/mod.rs", "use super::worker::X;"), ["worker::X"]);
    assert_eq!(named("src/clock.rs", "use super::worker::X;"), ["worker::X"]);
    assert_eq!(named("src/http/openai/chat.rs", "use super::super::error::E;"), Vec::<String>::new());
    assert_eq!(named("src/http/openai/mod.rs", "use super::super::store::E;"), ["store::E"]);
}

#[test]
fn the_table_refuses() {
    let paths: BTreeSet<String> =
        ["domain::Job", "scheduler::handle::Handle", "scheduler::state::State", "config::Config", "text_enum"]
            .map(str::to_owned)
            .into();
    assert_eq!(forbidden("http", &paths), ["config::Config", "scheduler::state::State"]);
    assert_eq!(forbidden("domain", &paths).len(), 3);
    assert_eq!(forbidden("app", &paths), Vec::<&str>::new());
    assert_eq!(forbidden("newcomer", &paths).len(), 5);
}

#[test]
fn sql_is_found_in_texts_but_not_in_comments() {
    assert_eq!(sql("fn f() { query(\"SELECT 1\") }"), ["SELECT "]);
    assert_eq!(sql("fn f() { query(r#\"\n  INSERT INTO job\"#); sqlx::query(x) }"), ["INSERT INTO ", "sqlx::"]);
    assert_eq!(sql("// SELECT 1\nfn f() { \"sqlx::\"; }"), Vec::<&str>::new());
}
