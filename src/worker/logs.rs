//! Log capture: a worker's stdout and stderr are always drained, into a file of limited size and a tail in memory.

use std::collections::VecDeque;
use std::io::PipeReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::worker::plain::{plain, without_middle};

/// A log file is moved to `.1` when it reaches this; so one model's logs take twice as much at most.
pub(super) const FILE_LIMIT_BYTES: u64 = 10 << 20;
/// The middle of longer lines is left out.
const LINE_LIMIT_BYTES: usize = 8 << 10;
/// Kept of the end of a line that is cut: it says most.
const END_LIMIT_BYTES: usize = 512;
/// Lines kept in memory for reasons.
const TAIL_LINES: usize = 50;
/// Most lines in a reason, and its length in bytes.
const REASON_LINES: usize = 3;
const REASON_LIMIT_BYTES: usize = 400;
/// Between them.
const LINES_APART: &str = " / ";
/// A line names its level within so many words, after the time and who wrote it.
const LEVEL_WITHIN: usize = 12;
/// How long a file that could not be written is left alone: a full disk is not asked again for each line.
const REOPEN_AFTER: Duration = Duration::from_secs(5);
/// How engines say that a device has not enough memory, in small letters.
const OUT_OF_MEMORY: [&str; 6] = [
    "cuda out of memory",
    "outofmemoryerror",
    "out of memory on the gpu",
    // vLLM: nothing is left beside the weights; others hold too much; too little is left for one request of the longest kind.
    "no available memory for the cache blocks",
    "is less than desired gpu memory utilization",
    "larger than the available kv cache memory",
];

/// How programs say that somebody else listens on their port, in small letters.
const PORT_TAKEN: [&str; 2] = ["address already in use", "eaddrinuse"];

/// Where the log of a model's worker is. No name has a `+` in it, so no other model's log is there.
pub(super) fn path(dir: &Path, model: &str, replica: u32) -> PathBuf {
    let name = file_name(model);
    match replica {
        0 => dir.join(format!("{name}.log")),
        _ => dir.join(format!("{name}+{replica}.log")),
    }
}

/// Where the log of a model's fetcher is.
pub(super) fn fetch_path(dir: &Path, model: &str) -> PathBuf {
    dir.join(format!("{}+fetch.log", file_name(model)))
}

/// Where the log of a spare process is until it is a model's worker: no model's name starts with a `+`.
pub(super) fn spare_path(dir: &Path, folder: &str, index: usize) -> PathBuf {
    dir.join(format!("+spare-{}-{index}.log", file_name(folder)))
}

fn file_name(name: &str) -> String {
    let keep = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().map(|c| if keep(c) { c } else { '_' }).collect()
}

/// The latest lines of one process, without what a terminal would obey: they become reasons. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl Tail {
    /// Oldest first.
    pub(super) fn lines(&self) -> Vec<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }

    /// What says best why a process ended: the last line that names an error, else the last lines, in one. None that is only
    /// information: what it did before it ended is not why.
    pub(super) fn reason(&self) -> Option<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let is_information = |line: &str| {
            let words = line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
            words.take(LEVEL_WITHIN).any(|word| matches!(word, "INFO" | "DEBUG"))
        };
        let mut meaningful =
            lines.iter().rev().map(|line| line.trim()).filter(|line| !line.is_empty() && !is_information(line));
        let names_error = |line: &&str| {
            let line = line.to_ascii_lowercase();
            ["error", "exception", "cannot ", "failed", "fatal"].iter().any(|word| line.contains(word))
        };
        let short = |line: &str| without_middle(line, REASON_LIMIT_BYTES).into_owned();
        if let Some(line) = meaningful.clone().find(names_error) {
            return Some(short(line));
        }
        let mut reason = short(meaningful.next()?);
        for line in meaningful.take(REASON_LINES - 1) {
            if line.len() + LINES_APART.len() + reason.len() > REASON_LIMIT_BYTES {
                break;
            }
            reason = [line, &reason].join(LINES_APART);
        }
        Some(reason)
    }

    /// Whether a line says, in the words of torch or vLLM, that the device has not enough memory.
    pub(super) fn tells_out_of_memory(&self) -> bool {
        self.tells(&OUT_OF_MEMORY)
    }

    /// Whether a line says that somebody else listens on this port, and names it: a program may want others, too.
    pub(super) fn tells_port_taken(&self, port: u16) -> bool {
        let port = port.to_string();
        let names_it = |line: &str| line.split(|c: char| !c.is_ascii_digit()).any(|number| number == port);
        self.any_line(|line| has_one(line, &PORT_TAKEN) && names_it(line))
    }

    /// Whether one of these, in small letters, is in a line.
    fn tells(&self, any: &[&str]) -> bool {
        self.any_line(|line| has_one(line, any))
    }

    /// Whether a line is so, in small letters.
    fn any_line(&self, is_so: impl Fn(&str) -> bool) -> bool {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().any(|line| is_so(&line.to_ascii_lowercase()))
    }

    /// `reason` and the line that explains it best.
    pub(super) fn explain(&self, reason: String) -> String {
        let said = reason.split_once(": ").map_or("", |(_, said)| said);
        match self.reason() {
            // It has told and logged the same.
            Some(line) if !said.is_empty() && line.contains(said) => reason,
            Some(line) => format!("{reason}; its log says: {line}"),
            None => reason,
        }
    }

    fn push(&self, line: &[u8]) {
        let line = plain(&String::from_utf8_lossy(line)).into_owned();
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

fn has_one(line: &str, of: &[&str]) -> bool {
    of.iter().any(|words| line.contains(words))
}

/// Reads `pipe` until every process that holds its other end is gone. Trouble with the file never stops the draining: a
/// worker whose pipe is full would hang.
/// What comes after `path` has changed goes there.
pub(super) async fn capture(pipe: PipeReader, mut path: watch::Receiver<PathBuf>, tail: Tail, limit_bytes: u64) {
    let mut pipe = match pipe::Receiver::from_owned_fd(pipe.into()) {
        Ok(pipe) => pipe,
        Err(error) => {
            tracing::error!("the worker's output cannot be read: {error}");
            return;
        }
    };
    let first = path.borrow_and_update().clone();
    let mut file = File::open(first, limit_bytes).await;
    let mut lines = Lines::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match pipe.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => {
                let cut = lines.take(&buffer[..count], &tail);
                // An error: nobody can change it any more.
                if path.has_changed().unwrap_or(false) {
                    let next = path.borrow_and_update().clone();
                    file = File::open(next, limit_bytes).await;
                }
                file.write(&cut).await;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!("the worker's output cannot be read: {error}");
                break;
            }
        }
    }
    let rest = lines.end(&tail);
    file.write(&rest).await;
}

/// Cuts bytes into lines of limited length.
#[derive(Default)]
struct Lines {
    /// The start of a line whose end has not come.
    line: Vec<u8>,
    /// The end of what came of it beyond the limit.
    end: Vec<u8>,
    is_cut: bool,
}

impl Lines {
    /// What to write: whole lines only.
    fn take(&mut self, mut bytes: &[u8], tail: &Tail) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.line.len() + bytes.len());
        while let Some(at) = bytes.iter().position(|b| *b == b'\n') {
            self.extend(&bytes[..at]);
            out.extend(self.end(tail));
            bytes = &bytes[at + 1..];
        }
        self.extend(bytes);
        out
    }

    fn extend(&mut self, bytes: &[u8]) {
        let room = LINE_LIMIT_BYTES - self.line.len();
        let (head, beyond) = bytes.split_at(bytes.len().min(room));
        self.line.extend_from_slice(head);
        self.end.extend_from_slice(beyond);
        let too_many = self.end.len().saturating_sub(END_LIMIT_BYTES);
        self.is_cut |= too_many > 0;
        self.end.drain(..too_many);
    }

    fn end(&mut self, tail: &Tail) -> Vec<u8> {
        let mut line = std::mem::take(&mut self.line);
        if std::mem::take(&mut self.is_cut) {
            line.extend_from_slice("…".as_bytes());
        }
        line.append(&mut self.end);
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        if line.is_empty() {
            return line;
        }
        tail.push(&line);
        line.push(b'\n');
        line
    }
}

/// A file that is moved aside when it is full.
struct File {
    path: PathBuf,
    limit_bytes: u64,
    open: Option<(tokio::fs::File, u64)>,
    /// Since when it could not be written; nothing is said of a second failure in a row.
    failed_at: Option<Instant>,
}

impl File {
    async fn open(path: PathBuf, limit_bytes: u64) -> Self {
        let mut file = Self { path, limit_bytes, open: None, failed_at: None };
        file.reopen().await;
        file
    }

    async fn reopen(&mut self) {
        let opened = async {
            if let Some(dir) = self.path.parent() {
                tokio::fs::create_dir_all(dir).await?;
            }
            let mut options = tokio::fs::OpenOptions::new();
            let file = options.create(true).append(true).open(&self.path).await?;
            let size = file.metadata().await?.len();
            std::io::Result::Ok((file, size))
        };
        match opened.await {
            Ok(open) => self.open = Some(open),
            Err(error) => self.failed("opened", &error),
        }
    }

    fn failed(&mut self, done: &str, error: &std::io::Error) {
        self.open = None;
        if self.failed_at.replace(Instant::now()).is_none() {
            tracing::warn!(
                path = %self.path.display(),
                "a worker's log cannot be {done}: {error}; its lines are lost until it can, and the worker goes on"
            );
        }
    }

    async fn write(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.open.is_none() && self.failed_at.is_some_and(|at| at.elapsed() >= REOPEN_AFTER) {
            self.reopen().await;
        }
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let is_full = |(_, size): &(tokio::fs::File, u64)| *size > 0 && size + length > self.limit_bytes;
        if self.open.as_ref().is_some_and(is_full) {
            self.open = None;
            let aside = self.path.with_extension("log.1");
            if let Err(error) = tokio::fs::rename(&self.path, &aside).await {
                return self.failed("moved aside when it is full", &error); // Rather lose lines than grow without limit.
            }
            self.reopen().await;
        }
        let Some((file, size)) = &mut self.open else {
            return;
        };
        let written = async {
            file.write_all(bytes).await?;
            file.flush().await
        };
        match written.await {
            Ok(()) => {
                *size += length;
                self.failed_at = None;
            }
            Err(error) => self.failed("written", &error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_kept() {
        let tail = Tail::default();
        let mut lines = Lines::default();
        assert_eq!(lines.take(b"one\r\n\ntw", &tail), b"one\n");
        assert_eq!(lines.take(b"o\n", &tail), b"two\n");
        let long = vec![b'x'; 3 * LINE_LIMIT_BYTES];
        assert!(lines.take(&long, &tail).is_empty());
        let cut = lines.take(b"the end\nafter", &tail);
        assert_eq!(cut.len(), LINE_LIMIT_BYTES + END_LIMIT_BYTES + "…\n".len());
        assert!(cut.ends_with(b"xthe end\n"));
        assert_eq!(lines.end(&tail), b"after\n");
        assert_eq!(tail.lines().len(), 4);
    }

    #[test]
    fn the_tail_keeps_the_last_lines_and_names_the_error() {
        let tail = Tail::default();
        assert_eq!(tail.reason(), None);
        for at in 0..120 {
            tail.push(format!("line {at}").as_bytes());
        }
        assert_eq!(tail.lines().len(), TAIL_LINES);
        assert_eq!(tail.lines()[0], "line 70");
        assert_eq!(tail.reason().as_deref(), Some("line 117 / line 118 / line 119"));
        tail.push(b"ValueError: no such folder");
        tail.push(b"bye");
        tail.push(b"  ");
        assert_eq!(tail.reason().as_deref(), Some("ValueError: no such folder"));
    }

    #[test]
    fn where_no_line_names_an_error_the_last_lines_are_the_reason() {
        let reason = |lines: &[&str]| {
            let tail = Tail::default();
            lines.iter().for_each(|line| tail.push(line.as_bytes()));
            tail.reason().unwrap()
        };
        let said = ["ls: unrecognized option '--foo'", "  ", "Try 'ls --help' for more information."];
        assert_eq!(reason(&said), "ls: unrecognized option '--foo' / Try 'ls --help' for more information.");
        let traceback = ["Traceback (most recent call last):", "  File \"x.py\", line 1", "KeyError: 'x'"];
        assert_eq!(reason(&traceback), "KeyError: 'x'", "it says it all");
        let long = "x".repeat(390);
        assert_eq!(reason(&["first", &long, "last"]), format!("{long} / last"));
        assert_eq!(reason(&["first", &"x".repeat(399), "last"]), "last", "no line but the last is cut");
    }

    #[test]
    fn a_reason_has_nothing_that_a_terminal_obeys_and_the_end_of_the_line() {
        for zeros in [3_000, 30_000] {
            let tail = Tail::default();
            let mut lines = Lines::default();
            lines.take(&vec![0; zeros], &tail);
            lines.take(b"\x1b[31mbad \x07model: it is gone\x1b[0m", &tail);
            lines.end(&tail);
            assert_eq!(
                tail.reason().as_deref().map(|line| line.trim_start_matches([' ', '…'])),
                Some("bad  model: it is gone")
            );
        }
        let tail = Tail::default();
        tail.push(format!("RuntimeError: {} no kernel for this device", "x".repeat(1_000)).as_bytes());
        let reason = tail.reason().unwrap();
        assert!(reason.starts_with("RuntimeError: x") && reason.ends_with("x no kernel for this device"), "{reason}");
        assert!(reason.len() <= REASON_LIMIT_BYTES + "…".len());
    }

    #[test]
    fn information_is_no_reason_and_what_was_told_is_not_told_again() {
        let tail = Tail::default();
        tail.push(b"2026-11-28 12:00:00,123 INFO parked in 0.3 s");
        assert_eq!(tail.explain("it was killed by SIGKILL".into()), "it was killed by SIGKILL");
        tail.push(b"2026-11-28 12:00:01,123 ERROR load failed: no such weights");
        tail.push(b"INFO:     127.0.0.1 - \"GET /health HTTP/1.1\" 503 failed");
        let told = "its worker says: no such weights";
        assert_eq!(tail.explain(told.into()), told);
        assert!(
            tail.explain("it exited".into())
                .ends_with("its log says: 2026-11-28 12:00:01,123 ERROR load failed: no such weights")
        );
    }

    #[test]
    fn engines_say_in_many_words_that_memory_ran_out() {
        for line in [
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
            "ValueError: Free memory on device (9.1/79.1 GiB) on startup is less than desired GPU memory utilization (0.9)",
            "(9.00 GiB KV cache is needed, which is larger than the available KV cache memory (2.00 GiB)",
        ] {
            let tail = Tail::default();
            tail.push(b"loading");
            assert!(!tail.tells_out_of_memory());
            tail.push(line.as_bytes());
            tail.push(b"bye");
            assert!(tail.tells_out_of_memory(), "{line}");
        }
    }

    #[test]
    fn a_port_is_taken_that_a_line_names() {
        let told = |line: &str| {
            let tail = Tail::default();
            tail.push(line.as_bytes());
            tail.push(b"bye 8001");
            tail.tells_port_taken(8001)
        };
        assert!(told(
            "[Errno 98] error while attempting to bind on address ('127.0.0.1', 8001): address already in use"
        ));
        assert!(told("Error: listen EADDRINUSE: address already in use 127.0.0.1:8001"));
        assert!(!told("listen tcp :9464: bind: address already in use"), "another");
        assert!(!told("listen tcp :18001: bind: address already in use"), "another");
        assert!(!told("OSError: [Errno 98] Address already in use"), "it may be any");
    }

    #[test]
    fn model_names_make_plain_file_names() {
        let file = path(Path::new("/logs"), "a/../b c", 0);
        assert_eq!(file, Path::new("/logs/a_.._b_c.log"));
        assert_eq!(path(Path::new("/logs"), "m", 2), Path::new("/logs/m+2.log"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_disk_loses_lines_and_a_mended_one_has_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.log");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut file = File::open(path.clone(), 1_000).await;
        file.write(b"lost\n").await;
        assert!(file.open.is_none());
        std::fs::remove_file(&path).unwrap();
        file.write(b"too early\n").await;
        assert!(!path.exists(), "it is not tried for each line");
        tokio::time::advance(REOPEN_AFTER).await;
        file.write(b"kept\n").await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept\n");
    }

    #[tokio::test]
    async fn what_comes_after_the_path_has_changed_is_in_the_other_file() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("spare.log"), dir.path().join("m.log"));
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (target, path) = watch::channel(first.clone());
        let capturing = capture(reader, path, Tail::default(), 100_000);
        let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        let told = async {
            writeln!(writer, "imported").unwrap();
            while text(&first).is_empty() {
                tokio::task::yield_now().await;
            }
            target.send_replace(second.clone());
            writeln!(writer, "reading").unwrap();
            drop(writer);
        };
        tokio::join!(capturing, told);
        assert_eq!((text(&first).as_str(), text(&second).as_str()), ("imported\n", "reading\n"));
    }

    #[tokio::test]
    async fn a_full_file_is_moved_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.log");
        let (reader, mut writer) = std::io::pipe().unwrap();
        let tail = Tail::default();
        let writing = std::thread::spawn(move || {
            use std::io::Write;
            for at in 0..20_000 {
                writeln!(writer, "this is line number {at}").unwrap();
            }
        });
        capture(reader, watch::channel(path.clone()).1, tail.clone(), 100_000).await;
        writing.join().unwrap();
        let size = |p: &Path| std::fs::metadata(p).unwrap().len();
        assert!(size(&path) <= 100_000);
        assert!(size(&path.with_extension("log.1")) <= 100_000);
        assert_eq!(tail.lines().last().map(String::as_str), Some("this is line number 19999"));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("this is line number 19999\n"));
    }
}
