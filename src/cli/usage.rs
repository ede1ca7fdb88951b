//! `roundhouse usage`: who had how much of the GPUs.

use std::io::Write;
use std::process::ExitCode;

use serde_json::Value;

use super::api::Server;
use super::counted;

const COLUMNS: [&str; 6] = ["jobs", "work_s", "swap_s", "idle_s", "gpu_s", "cost"];

/// Prints a table by model, tenant, batch or job, its total, and what grouping saved.
pub(super) async fn usage(
    server: &Server,
    by: &str,
    from: Option<&str>,
    to: Option<&str>,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let mut path = format!("/v1/usage?by={by}");
    for (name, value) in [("from", from), ("to", to)] {
        if let Some(value) = value {
            path += &format!("&{name}={}", value.replace('+', "%2B"));
        }
    }
    let usage = server.get(&path).await?;
    out.write_all(table(&usage, by).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn table(usage: &Value, by: &str) -> String {
    let has_cost = usage["gpu_hourly_cost"].is_number();
    let columns = &COLUMNS[..if has_cost { 6 } else { 5 }];
    let cells = |name: String, row: &Value| {
        std::iter::once(name).chain(columns.iter().map(|column| figure(&row[*column]))).collect::<Vec<String>>()
    };
    let mut rows = vec![std::iter::once(by).chain(columns.iter().copied()).map(str::to_uppercase).collect()];
    for row in usage["data"].as_array().into_iter().flatten() {
        rows.push(cells(row[by].as_str().unwrap_or("(none)").to_owned(), row));
    }
    rows.push(cells("total".to_owned(), &usage["total"]));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=columns.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let name = format!("{:<width$}", row[0], width = widths[0]);
        let figures = row[1..].iter().zip(&widths[1..]).map(|(cell, width)| format!("  {cell:>width$}"));
        text += format!("{name}{}", figures.collect::<String>()).trim_end();
        text.push('\n');
    }
    if let (Some(seconds), Some(swaps), Some(in_order)) = (
        usage["saved"]["gpu_s"].as_f64(),
        usage["saved"]["swaps"].as_u64(),
        usage["saved"]["swaps_in_arrival_order"].as_u64(),
    ) {
        let cost =
            usage["saved"]["cost"].as_f64().map_or(String::new(), |cost| format!(", {:.2} of money", cost.abs()));
        let word = if seconds < 0.0 { "cost" } else { "saved" };
        let seconds = seconds.abs();
        text += &format!(
            "grouping {word} about {seconds:.0} GPU s{cost} (an estimate: {} where order of arrival takes {in_order})\n",
            counted(swaps, "swap")
        );
    }
    text
}

fn figure(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Number(number) if number.is_f64() => format!("{:.1}", number.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_total_and_says_what_is_an_estimate() {
        let usage = json!({
            "gpu_hourly_cost": null,
            "data": [
                {"model": "flux", "jobs": 12, "work_s": 40.0, "swap_s": 8.0, "idle_s": 2.5, "gpu_s": 50.5, "cost": null},
                {"model": null, "jobs": 0, "work_s": 0.0, "swap_s": 0.0, "idle_s": 9.5, "gpu_s": 9.5, "cost": null},
            ],
            "total": {"jobs": 12, "work_s": 40.0, "swap_s": 8.0, "idle_s": null, "gpu_s": 60.0, "cost": null},
            "saved": {"gpu_s": 120.4, "swaps": 2, "swaps_in_arrival_order": 59, "cost": null},
        });
        let expected = "\
MODEL   JOBS  WORK_S  SWAP_S  IDLE_S  GPU_S
flux      12    40.0     8.0     2.5   50.5
(none)     0     0.0     0.0     9.5    9.5
total     12    40.0     8.0       -   60.0
grouping saved about 120 GPU s (an estimate: 2 swaps where order of arrival takes 59)
";
        assert_eq!(table(&usage, "model"), expected);
    }
}
