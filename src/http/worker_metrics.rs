//! What workers tell in `/metrics` of their own, passed on with labels that say whose it is. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::http::metrics::{SERIES, escaped};
use crate::scheduler::handle::WorkerMetrics;

/// What samples of another name a family has: those of summaries, histograms and counters.
const SUFFIXES: [&str; 5] = ["_sum", "_count", "_bucket", "_total", "_created"];

/// A metric of that name, of all workers: the format wants its lines together.
#[derive(Default)]
struct Family<'a> {
    /// The first `# HELP` and `# TYPE` line.
    help: Option<&'a str>,
    kind: Option<&'a str>,
    samples: String,
}

/// The series of all these workers in Prometheus text format 0.0.4, each sample with the labels `model` and `replica`; a
/// label of the worker's own that is called so becomes `exported_model`, `exported_replica`, as Prometheus itself does it.
/// What is no sample is left out, and so is what has the name of a series of this program.
pub(super) fn render(workers: &[WorkerMetrics]) -> String {
    let mut families: BTreeMap<&str, Family<'_>> = BTreeMap::new();
    for worker in workers {
        let whose = format!("model=\"{}\",replica=\"{}\"", escaped(&worker.model), worker.replica);
        let mut of = "";
        for line in worker.text.lines() {
            let mut words = line.splitn(4, ' ');
            if let (Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name)) = (words.next(), words.next(), words.next())
            {
                of = name;
                let family = families.entry(name).or_default();
                let comment = if what == "HELP" { &mut family.help } else { &mut family.kind };
                comment.get_or_insert(line);
            } else if let Some((name, labels, value)) = sample(line) {
                let is_of = |rest: &str| rest.is_empty() || SUFFIXES.contains(&rest);
                let family = name.strip_prefix(of).filter(|rest| is_of(rest)).map_or(name, |_| of);
                let samples = &mut families.entry(family).or_default().samples;
                let _ = write!(samples, "{name}{{{whose}");
                for (label, text) in labels {
                    let exported = if matches!(label, "model" | "replica") { "exported_" } else { "" };
                    let _ = write!(samples, ",{exported}{label}=\"{text}\"");
                }
                let _ = writeln!(samples, "}} {value}");
            }
        }
    }
    families.retain(|name, family| !family.samples.is_empty() && SERIES.iter().all(|(own, ..)| own != name));
    let mut out = String::new();
    for family in families.values() {
        for comment in [family.help, family.kind].into_iter().flatten() {
            let _ = writeln!(out, "{comment}");
        }
        out.push_str(&family.samples);
    }
    out
}

/// Names and texts, these escaped as they came.
type Labels<'a> = Vec<(&'a str, &'a str)>;

/// Name, labels, and value with its time if it has one, of a line.
fn sample(line: &str) -> Option<(&str, Labels<'_>, &str)> {
    let end = line.find(|c: char| !is_of_a_name(c)).filter(|end| *end > 0)?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = rest.trim();
    let mut words = value.split_ascii_whitespace();
    words.next()?.parse::<f64>().ok()?;
    (words.all(|time| time.parse::<i64>().is_ok())).then_some((name, labels, value))
}

/// The labels up to the brace that closes them, and what follows it.
fn labels(mut text: &str) -> Option<(Labels<'_>, &str)> {
    let mut found = Vec::new();
    loop {
        text = text.trim_start();
        if let Some(rest) = text.strip_prefix('}') {
            return Some((found, rest));
        }
        let (name, value) = text.split_once('=')?;
        let value = value.trim_start().strip_prefix('"')?;
        let mut is_escaped = false;
        let end = value.find(|c| {
            let ends = c == '"' && !is_escaped;
            is_escaped = c == '\\' && !is_escaped;
            ends
        })?;
        let name = name.trim();
        found.push((name, &value[..end]));
        let is_name = !name.is_empty() && name.chars().all(is_of_a_name);
        text = is_name.then(|| value[end + 1..].trim_start())?;
        text = text.strip_prefix(',').unwrap_or(text);
    }
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(model: &str, replica: u32, text: &str) -> WorkerMetrics {
        WorkerMetrics { model: model.to_owned(), replica, text: text.to_owned() }
    }

    #[test]
    fn each_sample_says_whose_it_is_and_a_family_stands_together() {
        let text = "# HELP run Requests that run.\n# TYPE run gauge\nrun{engine=\"0\"} 3\n\
                    # TYPE took histogram\ntook_bucket{le=\"+Inf\"} 2\ntook_sum 0.5\ntook_count 2\n";
        let other = "# HELP run Requests that run.\n# TYPE run gauge\nrun{engine=\"0\",} NaN 1790000000000\n";
        assert_eq!(
            render(&[worker("a\"b", 0, text), worker("c", 1, other)]),
            "# HELP run Requests that run.\n# TYPE run gauge\n\
             run{model=\"a\\\"b\",replica=\"0\",engine=\"0\"} 3\n\
             run{model=\"c\",replica=\"1\",engine=\"0\"} NaN 1790000000000\n\
             # TYPE took histogram\n\
             took_bucket{model=\"a\\\"b\",replica=\"0\",le=\"+Inf\"} 2\n\
             took_sum{model=\"a\\\"b\",replica=\"0\"} 0.5\n\
             took_count{model=\"a\\\"b\",replica=\"0\"} 2\n"
        );
    }

    #[test]
    fn a_label_of_the_same_name_is_kept_under_another() {
        let text = r#"x{model="a } \" , b", replica="7",m="1"} 1"#;
        assert_eq!(
            render(&[worker("w", 0, text)]),
            "x{model=\"w\",replica=\"0\",exported_model=\"a } \\\" , b\",exported_replica=\"7\",m=\"1\"} 1\n"
        );
    }

    #[test]
    fn what_is_no_sample_and_what_has_a_name_of_ours_is_left_out() {
        let text = "<html>\n{\"a\": 1}\nx\nx one\nx{a=\"1\nx{a} 1\nx{=\"1\"} 1\nx 1 soon\n# EOF\n# TYPE empty gauge\n\
                    # TYPE roundhouse_jobs gauge\nroundhouse_jobs{state=\"queued\"} 5\n\n";
        assert_eq!(render(&[worker("w", 0, text)]), "");
    }
}
