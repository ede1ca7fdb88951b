//! What is aimed for, as ratios within one run, and what was found.

use crate::disk::RECORD_BYTES;
use crate::measure::{Figures, count};

/// A figure, its target, and the case that shows where its time goes.
struct Row {
    figure: &'static str,
    target: String,
    got: Result<Got, String>,
    case: &'static str,
}

/// As shown, whether the target is met, and whether others kept the processors busy; not there: why it is not known.
struct Got {
    text: String,
    is_met: bool,
    is_noisy: bool,
}

/// Prints the table. Returns the cases of the targets that were missed.
pub(crate) fn show(f: &Figures) -> Vec<(&'static str, &'static str)> {
    let rows = rows(f);
    let width = rows.iter().map(|row| row.figure.len()).max().unwrap_or(0);
    let target = rows.iter().map(|row| row.target.len()).max().unwrap_or(0);
    let shown = |row: &Row| row.got.as_ref().map_or_else(Clone::clone, |got| got.text.clone());
    let result = rows.iter().map(|row| shown(row).len()).max().unwrap_or(0);
    println!("  {:<width$}  {:<target$}  {:<result$}  ok", "figure", "target", "got");
    let mut missed = Vec::new();
    let (mut met, mut noisy, mut open) = (0, 0, 0);
    for row in &rows {
        let verdict = match &row.got {
            Ok(got) => {
                met += usize::from(got.is_met);
                noisy += usize::from(got.is_noisy);
                if !got.is_met {
                    missed.push((row.figure, row.case));
                }
                let word = if got.is_met { "yes" } else { "NO" };
                if got.is_noisy { format!("{word} (noisy)") } else { word.to_owned() }
            }
            Err(_) => {
                open += 1;
                "-".to_owned()
            }
        };
        println!("  {:<width$}  {:<target$}  {:<result$}  {verdict}", row.figure, row.target, shown(row));
    }
    println!("  {met} met, {} missed, {open} not measured in this run", missed.len());
    if noisy > 0 {
        println!(
            "  noisy: other processes kept the processors busy while it was measured; run again on a quiet machine"
        );
    }
    missed
}

fn rows(f: &Figures) -> Vec<Row> {
    let record = RECORD_BYTES as f64;
    let whole = record + 1_024.0;
    vec![
        ratio(f, "enqueue, 64 submitters, to effectum's", 2.0, "enqueue-64", "effectum.enqueue.64", "enqueue-64"),
        ratio(f, "enqueue, 64, to our rows one transaction each", 8.0, "enqueue-64", "bare.1", "enqueue-64"),
        ratio(f, "enqueue, 64, to the raw log's records at 64", 0.22, "enqueue-64", "raw.log.64", "enqueue-64"),
        ratio(f, "enqueue, 256 submitters, to effectum's", 3.0, "enqueue-256", "effectum.enqueue.256", "enqueue-256"),
        ratio(f, "enqueue, 256, to the raw log's records at 256", 0.15, "enqueue-256", "raw.log.256", "enqueue-256"),
        ratio(f, "whole life, to effectum processing only", 2.5, "life", "effectum.process", "life"),
        ratio(f, "whole life, to apalis-sqlite processing only", 40.0, "life", "apalis.process", "life"),
        ratio(f, "whole life, to huey (FULL) processing only", 8.0, "life", "huey.process", "life"),
        ratio(f, "complete 32: batches to raw log flushes", 0.30, "complete.batches", "raw.log.1", "complete"),
        at_most(f, "claim 32: time with 1M waiting to 10k", 1.1, "claim.ms@1M", "claim.ms@10k", "claim"),
        ratio(f, "enqueue, 64: FULL to NORMAL", 0.8, "full.enqueue-64", "normal.enqueue-64", "enqueue-64"),
        ratio(f, "whole life: FULL to NORMAL", 0.8, "full.life", "normal.life", "life"),
        at_most(f, "acknowledged, 64: p50 in raw flushes of 64", 4.0, "enqueue-64.p50", "raw.log.64.ms", "enqueue-64"),
        at_most(
            f,
            "acknowledged, 64: p99.9 in raw flushes of 64",
            40.0,
            "enqueue-64.p999",
            "raw.log.64.ms",
            "enqueue-64",
        ),
        limit(f, "bytes written per enqueued job, 64", 4.5 * record, "enqueue-64.bytes", "enqueue-64", "B", 1.0),
        limit(f, "bytes written per whole life", 5.0 * whole, "life.bytes", "life", "B", 1.0),
        ratio(f, "enqueue, 256: busy processors to quiet", 0.3, "busy.enqueue-256", "quiet.enqueue-256", "enqueue-256"),
        at_most(f, "ack p99, 64: beside deletion to alone", 2.0, "purge.beside.p99", "purge.alone.p99", "enqueue-64"),
        ratio(f, "HTTP one job, 64 connections, to in-process", 0.35, "http-single", "enqueue-64", "http-single"),
        ratio(f, "HTTP 100 jobs, 16 connections, to in-process", 0.8, "http-bulk", "bulk", "http-bulk"),
        limit(f, "restart with 1M waiting: listening", 1_000.0, "restart.listening@1M", "restart", "ms", 1.0),
        limit(f, "restart with 1M waiting: first job running", 2_000.0, "restart.running@1M", "restart", "ms", 1.0),
        limit(f, "server's memory with 1M waiting", 150e6, "restart.resident@1M", "restart", "MB", 1e6),
        limit(f, "worker killed: its jobs run or wait again", 1_000.0, "death.again", "restart", "ms", 1.0),
        absent("bulk enqueue, to plainjob's addMany(100)", ">= 1", "plainjob is no part of this run"),
        absent("whole life, to plainjob processing only", ">= 3", "plainjob is no part of this run"),
    ]
}

/// A target that nothing here measures.
fn absent(figure: &'static str, target: &str, why: &str) -> Row {
    Row { figure, target: target.to_owned(), got: Err(why.to_owned()), case: "" }
}

/// Two figures, and whether one of them is noisy.
fn pair(f: &Figures, above: &str, below: &str) -> Result<(f64, f64, bool), String> {
    let found = |name: &str| f.get(name).filter(|n| n.value > 0.0).ok_or_else(|| format!("{name} was not measured"));
    let (above, below) = (found(above)?, found(below)?);
    Ok((above.value, below.value, above.is_noisy || below.is_noisy))
}

fn shown(n: f64) -> String {
    if n < 10.0 { format!("{n:.2}") } else { count(n) }
}

fn ratio(f: &Figures, figure: &'static str, least: f64, above: &str, below: &str, case: &'static str) -> Row {
    let got = pair(f, above, below).map(|(a, b, is_noisy)| {
        let text = format!("{:.2}  ({} / {})", a / b, shown(a), shown(b));
        Got { text, is_met: a / b >= least, is_noisy }
    });
    Row { figure, target: format!(">= {least}"), got, case }
}

fn at_most(f: &Figures, figure: &'static str, most: f64, above: &str, below: &str, case: &'static str) -> Row {
    let got = pair(f, above, below).map(|(a, b, is_noisy)| {
        let text = format!("{:.2}  ({a:.2} / {b:.2} ms)", a / b);
        Got { text, is_met: a / b <= most, is_noisy }
    });
    Row { figure, target: format!("<= {most}"), got, case }
}

fn limit(f: &Figures, figure: &'static str, most: f64, name: &str, case: &'static str, unit: &str, size: f64) -> Row {
    let got = f.get(name).ok_or_else(|| format!("{name} was not measured")).map(|found| {
        let text = format!("{:.0} {unit}", found.value / size);
        Got { text, is_met: found.value <= most, is_noisy: found.is_noisy }
    });
    Row { figure, target: format!("<= {:.0} {unit}", most / size), got, case }
}
