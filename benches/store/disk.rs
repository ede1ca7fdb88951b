//! What the disk can do without any database: the ceiling of everything that promises durability.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::measure::{Counters, Figures, Run, count, us};

/// A job as a log would have it: a body of 600 bytes and 100 around it.
pub(crate) const RECORD_BYTES: usize = 700;
/// tmpfs: fsync does nothing there.
const TMPFS: i64 = 0x0102_1994;

/// Refuses a folder where nothing is ever durable.
pub(crate) fn check(dir: &Path) -> anyhow::Result<()> {
    let found = nix::sys::statfs::statfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    anyhow::ensure!(
        found.filesystem_type().0 as i64 != TMPFS,
        "{} is in memory (tmpfs), where an fsync costs nothing: give --dir a folder on a disk",
        dir.display()
    );
    Ok(())
}

pub(crate) fn run(dir: &Path, limit: Duration, figures: &mut Figures) -> anyhow::Result<()> {
    let found = append(dir, 4096, 1, limit)?;
    println!("  fdatasync after 4 KiB append       {:>9}/s        {}", count(found.call_rate()), found.times());
    figures.put("raw.fdatasync", found.call_rate());
    for group in [1, 64, 256] {
        let found = append(dir, RECORD_BYTES, group, limit)?;
        println!("  log of 700 B, {group:>3} per fdatasync   {:>9} rec/s    {}", count(found.rate()), found.times());
        figures.put(format!("raw.log.{group}"), found.rate());
        figures.put(format!("raw.log.{group}.ms"), found.ms(0.5));
    }
    Ok(())
}

/// Appends to a growing file, `group` records and then a flush; a call is both.
fn append(dir: &Path, bytes: usize, group: usize, limit: Duration) -> anyhow::Result<Run> {
    let path = dir.join("raw.log");
    let mut file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let record = vec![0x5a_u8; bytes * group];
    let mut calls = Vec::new();
    let (begun, before) = (Instant::now(), Counters::now());
    while begun.elapsed() < limit {
        let call = Instant::now();
        file.write_all(&record)?;
        file.sync_data()?;
        calls.push(us(call.elapsed()));
    }
    let run = Run::new((calls.len() * group) as u64, begun.elapsed(), calls, Counters::now().since(before));
    drop(file);
    std::fs::remove_file(&path)?;
    Ok(run)
}
