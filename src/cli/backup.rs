//! `roundhouse backup` and `roundhouse restore`.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::time::Instant;

use crate::clock::SystemClock;
use crate::domain::storage::shown_bytes;
use crate::store::backup::{Count, Destination, Manifest, Progress, listed};
use crate::store::restore;

/// How often progress is written where it cannot be written in place.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// The same in place.
const PLACE_EVERY: Duration = Duration::from_millis(200);

/// `roundhouse backup ...`
#[derive(Clone, Debug, Args)]
pub struct BackupArgs {
    /// Folder of the backup; an earlier backup in it is brought up to date
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// The server's data dir; the server may run
    #[arg(long, value_name = "DIR", default_value = "./data", env = "ROUNDHOUSE_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Leave out files of jobs that are lost or damaged, instead of failing; their jobs are kept, and say so
    #[arg(long)]
    pub without_lost_files: bool,
}

/// `roundhouse restore ...`
#[derive(Clone, Debug, Args)]
pub struct RestoreArgs {
    /// Folder of the backup, or the --snapshot-dir of a server
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// Data dir to be made; one that has a database is refused
    #[arg(long, value_name = "DIR", env = "ROUNDHOUSE_DATA_DIR", required_unless_present = "check")]
    pub data_dir: Option<PathBuf>,
    /// Verify the backup and write nothing
    #[arg(long)]
    pub check: bool,
    /// Go on without files of jobs that are lost or damaged in the backup; their jobs are restored, and say so
    #[arg(long)]
    pub without_lost_files: bool,
}

/// Brings a backup up to date.
pub(super) fn backup(args: &BackupArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let (data_dir, dest) = (args.data_dir.display(), args.dest.display());
    let failed = || format!("cannot back up {data_dir} (--data-dir) to {dest}");
    let destination = Destination::open(&args.data_dir, &args.dest, None).with_context(failed)?;
    let (mut shown, without_lost) = (Shown::new(), args.without_lost_files);
    let done = destination.back_up(&SystemClock::default(), without_lost, &mut |progress| shown.show(progress));
    shown.end();
    let done = done.with_context(failed)?;
    writeln!(out, "backed up {data_dir} to {dest}")?;
    tell(&done.manifest, out)?;
    writeln!(out, "  files copied   {}", counted(done.copied))?;
    writeln!(out, "  already there  {}", counted(done.kept))?;
    writeln!(out, "  removed        {}", counted(done.removed))?;
    for lost in listed(done.lost.iter().map(ToString::to_string)) {
        writeln!(out, "  left out       {lost}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a data dir of a backup, or only verifies it.
pub(super) fn restore(args: &RestoreArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let (mut shown, without_lost) = (Shown::new(), args.without_lost_files);
    let source = args.source.display();
    let verified = match &args.data_dir {
        _ if args.check => restore::check(&args.source, without_lost, &mut |progress| shown.show(progress))
            .with_context(|| format!("{source} is not a whole backup")),
        Some(data_dir) => restore::restore(&args.source, data_dir, without_lost, &mut |progress| shown.show(progress))
            .with_context(|| format!("cannot restore {source} into {} (--data-dir)", data_dir.display())),
        None => bail!("name the data dir to be made with --data-dir"),
    };
    shown.end();
    let verified = verified?;
    let manifest = &verified.manifest;
    match &args.data_dir {
        Some(data_dir) if !args.check => writeln!(out, "restored {} from {source}", data_dir.display())?,
        _ if verified.lost.is_empty() => writeln!(out, "{source} is whole")?,
        _ => writeln!(out, "{source} can be restored, without {} files", verified.lost.len())?,
    }
    writeln!(out, "  taken          {} by roundhouse {}", manifest.created_at, manifest.version)?;
    tell(manifest, out)?;
    writeln!(out, "  files          {}", counted(verified.files))?;
    for path in
        listed(manifest.damaged.iter().map(|path| format!("artifacts/{path} (lost or damaged before the backup)")))
    {
        writeln!(out, "  not in it      {path}")?;
    }
    for lost in listed(verified.lost.iter().map(ToString::to_string)) {
        writeln!(out, "  left out       {lost}")?;
    }
    if !args.check {
        writeln!(
            out,
            "API keys and the secret of artifact URLs are not in a backup: old links of artifacts do not work any more."
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(manifest: &Manifest, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "  jobs           {}", jobs(&manifest.jobs))?;
    writeln!(out, "  database       {}", shown_bytes(manifest.database_bytes))
}

/// `1204: 1190 succeeded, 14 queued`
pub(super) fn jobs(by_state: &BTreeMap<String, u64>) -> String {
    let all: u64 = by_state.values().sum();
    let parts: Vec<String> = by_state.iter().map(|(state, count)| format!("{count} {state}")).collect();
    if parts.is_empty() { "none".to_owned() } else { format!("{all}: {}", parts.join(", ")) }
}

/// `3 (1.5 MiB)`
pub(super) fn counted(count: Count) -> String {
    if count.files == 0 { "0".to_owned() } else { format!("{} ({})", count.files, shown_bytes(count.bytes)) }
}

/// Progress on stderr: in place on a terminal, else a line now and then.
pub(super) struct Shown {
    is_terminal: bool,
    begun: Instant,
    last: Option<Instant>,
    in_place: bool,
}

impl Shown {
    pub(super) fn new() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal(), begun: Instant::now(), last: None, in_place: false }
    }

    pub(super) fn show(&mut self, progress: Progress) {
        let every = if self.is_terminal { PLACE_EVERY } else { LINE_EVERY };
        // What takes no time needs no progress.
        if self.begun.elapsed() < every || self.last.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        self.last = Some(Instant::now());
        let Progress { step, done, total } = progress;
        let line = match total.files {
            0 => format!("{step} ..."),
            all => {
                format!("{step}: {} of {all}, {} of {}", done.files, shown_bytes(done.bytes), shown_bytes(total.bytes))
            }
        };
        let mut err = std::io::stderr();
        // Nobody may read it any more.
        let _ = if self.is_terminal { write!(err, "\r\x1b[K{line}") } else { writeln!(err, "{line}") };
        let _ = err.flush();
        self.in_place = self.is_terminal;
    }

    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.in_place) {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// The folder as a person would name it.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
