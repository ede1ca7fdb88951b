//! `roundhouse simulate`: what the scheduler would do with a trace, and what simpler policies would.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;

use crate::config;
use crate::domain::Class;
use crate::sim::measure::{COLUMNS, Measures};
use crate::sim::{self, PolicyName, Told, Trace, picture};

/// Of the file with known measures beside a trace.
const REFERENCE: &str = "reference.csv";

/// Flags of `simulate`.
#[derive(Clone, Debug, Args)]
pub struct SimulateArgs {
    /// Trace files; tests/traces/README.md describes the format
    #[arg(required = true, value_name = "TRACE")]
    pub traces: Vec<PathBuf>,
    /// Policies to play each trace with: roundhouse, fifo, exhaustive, llama-swap, or all
    #[arg(long, value_delimiter = ',', default_value = "roundhouse", value_name = "NAME,...")]
    pub policy: Vec<String>,
    /// Knobs of the policy roundhouse, as they are named under `scheduler:` in models.yaml: max_wait.interactive=120s
    #[arg(long, value_delimiter = ',', value_name = "KEY=VALUE,...")]
    pub set: Vec<String>,
    /// Print rows with the columns of reference.csv instead of a table
    #[arg(long)]
    pub csv: bool,
    /// Draw what happened as an SVG; with several traces or policies a file each, their names added to FILE
    #[arg(long, value_name = "FILE.svg")]
    pub picture: Option<PathBuf>,
}

/// Plays traces and prints the measures. Nothing is printed of a trace that cannot be read.
pub(super) fn simulate(args: &SimulateArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let policies = policies(&args.policy)?;
    let knobs = config::knobs(&args.set).map_err(|error| anyhow!("--set: {error}"))?;
    let traces: Vec<(PathBuf, Trace)> =
        args.traces.iter().map(|path| Ok((path.clone(), Trace::read(path)?))).collect::<anyhow::Result<_>>()?;
    if args.csv {
        writeln!(out, "{}", COLUMNS.join(","))?;
    }
    for (path, trace) in &traces {
        let known = if args.csv { Vec::new() } else { reference(path, &trace.name)? };
        let (mut rows, mut told) = (Vec::new(), Vec::new());
        for policy in &policies {
            let tells = !args.csv && *policy == PolicyName::Roundhouse;
            let played = if tells { sim::simulate_told(trace, &knobs) } else { sim::simulate(trace, *policy, &knobs) };
            let record = played.with_context(|| format!("{} under {}", trace.name, policy.as_str()))?;
            let measures = Measures::of(trace, policy.as_str(), &record);
            if let Some(file) = &args.picture {
                let several = traces.len() * policies.len() > 1;
                let file = if several { named(file, &trace.name, policy.as_str()) } else { file.clone() };
                let svg = picture::draw(trace, &measures, &record);
                std::fs::write(&file, svg).with_context(|| format!("--picture: cannot write {}", file.display()))?;
            }
            if args.csv {
                writeln!(out, "{}", measures.csv())?;
            }
            told.push([Class::Interactive, Class::Batch].map(|class| Told::of(trace, &record, class)));
            rows.push(measures);
        }
        if !args.csv {
            out.write_all(table(trace, &rows, &known, &told).as_bytes())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn policies(names: &[String]) -> anyhow::Result<Vec<PolicyName>> {
    let mut chosen = Vec::new();
    for name in names {
        match (name.as_str(), PolicyName::parse(name)) {
            ("all", _) => chosen.extend(PolicyName::ALL),
            (_, Some(policy)) => chosen.push(policy),
            _ => {
                let known: Vec<&str> = PolicyName::ALL.iter().map(|policy| policy.as_str()).collect();
                bail!("--policy: `{name}` is unknown; known are {} and all", known.join(", "));
            }
        }
    }
    Ok(chosen)
}

/// What is known of a trace from a `reference.csv` beside it; without one: nothing.
fn reference(trace: &Path, name: &str) -> anyhow::Result<Vec<Measures>> {
    let path = trace.with_file_name(REFERENCE);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().filter_map(Measures::from_csv).filter(|row| row.trace == name).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("{}: cannot be read", path.display())),
    }
}

fn named(file: &Path, trace: &str, policy: &str) -> PathBuf {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let ending = file.extension().map_or_else(|| "svg".into(), |ending| ending.to_string_lossy());
    file.with_file_name(format!("{stem}-{trace}-{policy}.{ending}"))
}

/// How good the ranges were that jobs of both classes were told for their start.
type ToldBoth = [Option<Told>; 2];
/// One of its figures.
type Value<'a> = &'a dyn Fn(&ToldBoth) -> Option<f64>;

/// One line a measure, one column a policy; behind each value what the reference simulator got with the same policy. `told`:
/// by policy, if jobs were told when they should start.
pub(super) fn table(trace: &Trace, rows: &[Measures], known: &[Measures], told: &[ToldBoth]) -> String {
    let mut text = format!(
        "{}: {} jobs, {} models, {} GPUs of {} GB, {} GB of host memory\n",
        trace.name,
        trace.jobs.len(),
        trace.models.len(),
        trace.gpus,
        trace.gpu_gb,
        trace.host_gb
    );
    let has_reference = !known.is_empty();
    let _ = write!(text, "  {:<14}", "");
    for row in rows {
        let heads = if has_reference { ["", "reference"] } else { ["", ""] };
        let _ = write!(text, "{:>12}", row.policy);
        if has_reference {
            let _ = write!(text, "{:>12}", heads[1]);
        }
    }
    text.push('\n');
    for column in &COLUMNS[2..] {
        let _ = write!(text, "  {column:<14}");
        for row in rows {
            let _ = write!(text, "{:>12}", shown(row.get(column)));
            if has_reference {
                let other = known.iter().find(|known| known.policy == row.policy).and_then(|known| known.get(column));
                let _ = write!(text, "{:>12}", shown(other));
            }
        }
        text.push('\n');
    }
    if told.iter().flatten().any(Option::is_some) {
        let within = |class: usize| move |told: &ToldBoth| Some(told[class]?.within_percent);
        let width = |class: usize| move |told: &ToldBoth| Some(told[class]?.width);
        let lines: [(&str, Value); 4] = [
            ("int_in_range%", &within(0)),
            ("int_range/wait", &width(0)),
            ("bat_in_range%", &within(1)),
            ("bat_range/wait", &width(1)),
        ];
        for (name, value) in lines {
            let _ = write!(text, "  {name:<14}");
            for told in told {
                let _ = write!(text, "{:>12}", shown(value(told)));
                if has_reference {
                    let _ = write!(text, "{:>12}", "");
                }
            }
            text.push('\n');
        }
    }
    text.push('\n');
    text
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traces() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces")
    }

    fn args(traces: &[PathBuf]) -> SimulateArgs {
        let policy = vec!["roundhouse".to_owned()];
        SimulateArgs { traces: traces.to_vec(), policy, set: Vec::new(), csv: true, picture: None }
    }

    fn printed(args: &SimulateArgs) -> String {
        let mut out = Vec::new();
        simulate(args, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn refused(args: &SimulateArgs) -> String {
        let mut out = Vec::new();
        let error = format!("{:#}", simulate(args, &mut out).unwrap_err());
        assert!(out.is_empty(), "printed before it failed");
        error
    }

    #[test]
    fn rows_have_the_columns_of_the_reference() {
        let known = std::fs::read_to_string(traces().join(REFERENCE)).unwrap();
        let mut args = args(&[traces().join("small-201.csv"), traces().join("small-202.csv")]);
        args.policy = vec!["fifo".to_owned(), "roundhouse".to_owned()];
        let text = printed(&args);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], known.lines().next().unwrap());
        let begins: Vec<String> =
            lines[1..].iter().map(|line| line.split(',').take(2).collect::<Vec<_>>().join(",")).collect();
        assert_eq!(begins, ["small-201,fifo", "small-201,roundhouse", "small-202,fifo", "small-202,roundhouse"]);
        let decimals = |line: &str| -> Vec<usize> {
            line.split(',').skip(2).map(|v| v.split_once('.').map_or(0, |(_, after)| after.len())).collect()
        };
        assert_eq!(decimals(lines[1]), decimals(known.lines().nth(1).unwrap()));
    }

    #[test]
    fn the_table_shows_the_reference_beside() {
        let mut args = args(&[traces().join("small-201.csv")]);
        (args.csv, args.policy) = (false, vec!["fifo".to_owned()]);
        let text = printed(&args);
        assert!(text.contains("fifo   reference\n"), "{text}");
        assert!(text.contains("  swaps                17.00       17.00\n"), "{text}");
        assert!(!text.contains("in_range"), "only our own policy tells a start");
        args.policy = vec!["roundhouse".to_owned()];
        let own = printed(&args);
        assert!(own.contains("  int_in_range%") && own.contains("  int_range/wait"), "{own}");
        args.policy = vec!["fifo".to_owned()];
        let dir = tempfile::tempdir().unwrap();
        let alone = dir.path().join("small-201.csv");
        std::fs::copy(traces().join("small-201.csv"), &alone).unwrap();
        args.traces = vec![alone];
        assert!(printed(&args).contains("  swaps                17.00\n"), "no reference beside it, no column");
    }

    #[test]
    fn knobs_are_set_and_mistakes_in_them_told() {
        let mut args = args(&[traces().join("e-bulk50k-21.csv")]);
        let usual = printed(&args);
        let swaps = |text: &str| -> f64 {
            let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
            let column = lines.next().unwrap().iter().position(|name| *name == "swaps").unwrap();
            lines.next().unwrap()[column].parse().unwrap()
        };
        let all = ["max_wait.interactive=60", "max_wait.batch=15m", "max_visit=5m"];
        args.set =
            all.into_iter().chain(["swap_budget.interactive=50%", "swap_budget.other=0.15"]).map(Into::into).collect();
        assert_eq!(printed(&args), usual, "the defaults, said");
        args.set = vec!["max_wait.interactive=5m".to_owned()];
        assert!(swaps(&printed(&args)) < swaps(&usual), "callers wait longer, so there are fewer swaps");
        for (wrong, told) in [
            ("max_wait", "`max_wait`: write a key and its value, as max_wait.interactive=120s"),
            ("max_wait=5", "`max_wait` is unknown; known are max_wait.interactive, max_wait.batch"),
            ("max_visit=0", "max_visit: must be more than 0"),
            ("swap_budget.other=100%", "swap_budget.other: must lie between 0 and 1"),
        ] {
            args.set = vec![wrong.to_owned()];
            assert!(refused(&args).starts_with(&format!("--set: {told}")), "{}", refused(&args));
        }
    }

    #[test]
    fn pictures_are_named_after_what_they_show() {
        let dir = tempfile::tempdir().unwrap();
        let mut args = args(&[traces().join("small-201.csv")]);
        args.picture = Some(dir.path().join("p.svg"));
        printed(&args);
        let first = std::fs::read_to_string(dir.path().join("p.svg")).unwrap();
        assert!(first.starts_with("<svg ") && first.ends_with("</svg>\n"));
        args.policy.push("fifo".to_owned());
        printed(&args);
        assert_eq!(std::fs::read_to_string(dir.path().join("p-small-201-roundhouse.svg")).unwrap(), first);
        assert!(dir.path().join("p-small-201-fifo.svg").exists());
    }

    #[test]
    fn mistakes_are_named() {
        let mut unknown = args(&[traces().join("small-201.csv")]);
        unknown.policy = vec!["lifo".to_owned()];
        assert_eq!(
            refused(&unknown),
            "--policy: `lifo` is unknown; known are roundhouse, fifo, exhaustive, llama-swap and all"
        );
        let missing = args(&[traces().join("small-201.csv"), traces().join("none.csv")]);
        assert!(refused(&missing).contains("none.csv: cannot be read"), "before the first one is played");
        let no_trace = args(&[traces().join(REFERENCE)]);
        assert!(refused(&no_trace).contains("reference.csv:1: the first line without `#` must be"));
    }
}
