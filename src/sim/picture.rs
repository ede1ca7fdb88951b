//! A simulation as a picture: GPUs as lanes with coloured bars for the models that were on them, and below how many jobs
//! waited for each model. SVG, the same bytes for the same record.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use super::Trace;
use super::measure::Measures;
use super::record::{Record, Visit};

const LEFT: f64 = 130.0;
const WIDTH: f64 = 1120.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 92.0;
const LANE: f64 = 46.0;
const LANE_GAP: f64 = 8.0;
const DEPTH: f64 = 38.0;
const DEPTH_GAP: f64 = 12.0;
/// Pauses between jobs that are shorter than this many pixels are not drawn.
const SEEN_PX: f64 = 0.4;
/// A bar that is wider carries its model's name.
const NAMED_PX: f64 = 8.0;
/// Told apart by most people who see few colours, too.
const COLOURS: [&str; 12] = [
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#76b7b2", "#edc948", "#ff9da7", "#2f4b7c",
    "#8cd17d", "#79706e",
];

/// Draws what a policy did with a trace.
pub fn draw(trace: &Trace, measures: &Measures, record: &Record) -> String {
    let end = record.jobs.iter().filter_map(|job| job.end_s).fold(1.0, f64::max);
    let mut picture = Picture { trace, record, end, svg: String::new(), busy: busy_times(record) };
    let lanes = trace.gpus as f64 * (LANE + LANE_GAP);
    let depths = trace.models.len() as f64 * (DEPTH + DEPTH_GAP);
    let bottom = TOP + lanes + 30.0 + depths;
    let (width, height) = (LEFT + WIDTH + RIGHT, bottom + 40.0);
    picture.head(width, height, measures);
    picture.axis(bottom);
    for gpu in 0..trace.gpus {
        picture.lane(gpu, TOP + gpu as f64 * (LANE + LANE_GAP));
    }
    picture.heading("jobs waiting", TOP + lanes + 20.0);
    for model in 0..trace.models.len() {
        picture.depth(model, TOP + lanes + 30.0 + model as f64 * (DEPTH + DEPTH_GAP));
    }
    picture.svg.push_str("</svg>\n");
    picture.svg
}

struct Picture<'a> {
    trace: &'a Trace,
    record: &'a Record,
    end: f64,
    svg: String,
    /// By visit: when it had jobs.
    busy: Vec<Vec<Range<f64>>>,
}

impl Picture<'_> {
    fn x(&self, at: f64) -> f64 {
        LEFT + at / self.end * WIDTH
    }

    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.svg.write_fmt(text);
        self.svg.push('\n');
    }

    fn head(&mut self, width: f64, height: f64, measures: &Measures) {
        self.put(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#222\">"
        ));
        self.put(format_args!(
            "<defs><pattern id=\"cold\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" \
             patternTransform=\"rotate(45)\"><rect width=\"6\" height=\"6\" fill=\"#fff\" fill-opacity=\"0.75\"/>\
             <rect width=\"2\" height=\"6\" fill=\"#222\"/></pattern>\
             <pattern id=\"wake\" width=\"4\" height=\"4\" patternUnits=\"userSpaceOnUse\"><rect width=\"4\" height=\"4\" \
             fill=\"#fff\" fill-opacity=\"0.75\"/><circle cx=\"2\" cy=\"2\" r=\"1\" fill=\"#222\"/></pattern></defs>"
        ));
        self.put(format_args!("<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>"));
        let title = format!("{} under {}", measures.trace, measures.policy);
        self.put(format_args!(
            "<text x=\"{LEFT}\" y=\"26\" font-size=\"17\" font-weight=\"bold\">{}</text>",
            escape(&title)
        ));
        let of = |column| measures.get(column).unwrap_or(0.0);
        let line = format!(
            "{} jobs in {} ({:.2} x lower bound); {} loads, {} of them from host memory; GPUs busy {:.0} %; wait p99: \
             interactive {:.0} s, batch {:.0} s; deadlines missed {:.1} %",
            self.trace.jobs.len(),
            clock(self.end),
            of("span/LB"),
            of("swaps"),
            of("wakes"),
            of("busy%"),
            of("int_p99"),
            of("bat_p99"),
            of("dl_miss%")
        );
        self.put(format_args!("<text x=\"{LEFT}\" y=\"46\">{}</text>", escape(&line)));
        let legend = [
            ("has jobs", "#4e79a7", 1.0, ""),
            ("ready, idle", "#4e79a7", 0.3, ""),
            ("loads from disk", "#4e79a7", 1.0, "cold"),
            ("from host memory", "#4e79a7", 1.0, "wake"),
            ("stops or parks", "#444", 1.0, ""),
        ];
        let mut x = LEFT;
        for (word, colour, opacity, pattern) in legend {
            self.bar(x, 58.0, 22.0, 12.0, colour, opacity);
            if !pattern.is_empty() {
                self.bar(x, 58.0, 22.0, 12.0, &format!("url(#{pattern})"), 1.0);
            }
            self.put(format_args!("<text x=\"{}\" y=\"68\">{word}</text>", x + 28.0));
            x += 60.0 + 6.4 * word.len() as f64;
        }
        let note = "height of a bar: its share of the GPU's memory";
        self.put(format_args!("<text x=\"{}\" y=\"68\" fill=\"#666\">{note}</text>", x));
    }

    fn bar(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str, opacity: f64) {
        let faded = if opacity < 1.0 { format!(" fill-opacity=\"{opacity}\"") } else { String::new() };
        self.put(format_args!(
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{colour}\"{faded}/>"
        ));
    }

    fn axis(&mut self, bottom: f64) {
        let step = tick(self.end);
        let mut at = 0.0;
        while at <= self.end {
            let x = self.x(at);
            self.put(format_args!(
                "<line x1=\"{x:.2}\" x2=\"{x:.2}\" y1=\"{}\" y2=\"{bottom:.2}\" stroke=\"#ddd\"/>",
                TOP - 6.0
            ));
            self.put(format_args!(
                "<text x=\"{x:.2}\" y=\"{:.2}\" text-anchor=\"middle\">{}</text>",
                bottom + 18.0,
                clock(at)
            ));
            at += step;
        }
    }

    fn heading(&mut self, text: &str, y: f64) {
        self.put(format_args!("<text x=\"{LEFT}\" y=\"{y:.2}\" font-weight=\"bold\">{text}</text>"));
    }

    fn lane(&mut self, gpu: usize, y: f64) {
        self.put(format_args!(
            "<text x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"end\" font-weight=\"bold\">GPU {gpu}</text>",
            LEFT - 10.0,
            y + LANE / 2.0 + 4.0
        ));
        self.put(format_args!(
            "<rect x=\"{LEFT}\" y=\"{y:.2}\" width=\"{WIDTH}\" height=\"{LANE}\" fill=\"none\" stroke=\"#bbb\"/>"
        ));
        for (visit, begin_gb) in stacked(self.trace, &self.record.visits, gpu) {
            let per_gb = LANE / self.trace.gpu_gb.max(f64::MIN_POSITIVE);
            let height = self.trace.models[self.record.visits[visit].model].gb_per_gpu * per_gb;
            let top = y + LANE - begin_gb * per_gb - height;
            self.visit(visit, top, height);
        }
    }

    fn visit(&mut self, index: usize, y: f64, height: f64) {
        let visit = &self.record.visits[index];
        let model = &self.trace.models[visit.model];
        let colour = COLOURS[visit.model % COLOURS.len()];
        let ready = visit.ready_at.unwrap_or(self.end).min(self.end);
        let leave = visit.leave_at.unwrap_or(self.end).min(self.end);
        let gone = visit.gone_at.unwrap_or(self.end).min(self.end);
        let (x_load, x_ready, x_leave, x_gone) = (self.x(visit.load_at), self.x(ready), self.x(leave), self.x(gone));
        let pattern = if visit.wake { "url(#wake)" } else { "url(#cold)" };
        let from = if visit.wake { "host memory" } else { "disk" };
        let mut title = format!(
            "{}: loaded from {from} at {} in {:.1} s; {} jobs until {}",
            model.name,
            clock(visit.load_at),
            ready - visit.load_at,
            visit.jobs,
            clock(leave)
        );
        if let Some(why) = &visit.why {
            let _ = write!(title, "\n{why}");
        }
        let named = x_leave - x_ready > NAMED_PX + 6.4 * model.name.len() as f64 && height > 11.0;
        let label = escape(&model.name);
        self.put(format_args!("<g><title>{}</title>", escape(&title)));
        self.bar(x_load, y, x_ready - x_load, height, colour, 1.0);
        self.bar(x_load, y, x_ready - x_load, height, pattern, 1.0);
        self.bar(x_ready, y, x_leave - x_ready, height, colour, 0.3);
        let mut drawn = f64::NEG_INFINITY;
        let mut pieces: Vec<(f64, f64)> = Vec::new();
        for busy in &self.busy[index] {
            let (from, to) = (self.x(busy.start), self.x(busy.end));
            match pieces.last_mut() {
                Some(last) if from - drawn < SEEN_PX => last.1 = to,
                _ => pieces.push((from, to)),
            }
            drawn = to;
        }
        for (from, to) in pieces {
            self.bar(from, y, (to - from).max(SEEN_PX), height, colour, 1.0);
        }
        self.bar(x_leave, y, x_gone - x_leave, height, "#444", 1.0);
        self.put(format_args!(
            "<line x1=\"{x_load:.2}\" x2=\"{x_load:.2}\" y1=\"{y:.2}\" y2=\"{:.2}\" stroke=\"#222\" stroke-width=\"0.6\"/>",
            y + height
        ));
        if named {
            self.put(format_args!(
                "<text x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"middle\" font-size=\"11\" stroke=\"#fff\" stroke-width=\"2.5\" \
                 paint-order=\"stroke\">{label}</text>",
                (x_ready + x_leave) / 2.0,
                y + height / 2.0 + 4.0
            ));
        }
        self.svg.push_str("</g>\n");
    }

    fn depth(&mut self, model: usize, y: f64) {
        let columns = most_waiting(self.trace, self.record, model, self.end);
        let most = columns.iter().copied().max().unwrap_or(0);
        let colour = COLOURS[model % COLOURS.len()];
        let name = escape(&self.trace.models[model].name);
        let base = y + DEPTH;
        let x_label = LEFT - 10.0;
        self.put(format_args!(
            "<text x=\"{x_label}\" y=\"{:.2}\" text-anchor=\"end\" fill=\"{colour}\" font-weight=\"bold\">{name}</text>",
            y + 16.0
        ));
        self.put(format_args!(
            "<text x=\"{x_label}\" y=\"{:.2}\" text-anchor=\"end\" font-size=\"11\" fill=\"#666\">most {most}</text>",
            y + 31.0
        ));
        let mut path = format!("M{LEFT:.1} {base:.1}");
        for (column, waiting) in columns.iter().enumerate() {
            let top = base - DEPTH * *waiting as f64 / most.max(1) as f64;
            let x = LEFT + column as f64;
            if column == 0 || columns[column - 1] != *waiting {
                let _ = write!(path, "V{top:.1}");
            }
            if columns.get(column + 1) != Some(waiting) {
                let _ = write!(path, "H{:.1}", x + 1.0);
            }
        }
        self.put(format_args!("<path d=\"{path}V{base:.1}Z\" fill=\"{colour}\" fill-opacity=\"0.75\"/>"));
        self.put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{base:.2}\" y2=\"{base:.2}\" stroke=\"#999\"/>",
            LEFT + WIDTH
        ));
    }
}

/// When each worker had jobs, in order.
fn busy_times(record: &Record) -> Vec<Vec<Range<f64>>> {
    let mut times: BTreeMap<usize, Vec<Range<f64>>> = BTreeMap::new();
    for job in &record.jobs {
        if let (Some(worker), Some(start), Some(end)) = (job.worker, job.start_s, job.end_s) {
            times.entry(worker).or_default().push(start..end);
        }
    }
    (0..record.visits.len())
        .map(|visit| {
            let mut all = times.remove(&visit).unwrap_or_default();
            all.sort_by(|a, b| a.start.total_cmp(&b.start));
            let mut merged: Vec<Range<f64>> = Vec::new();
            for next in all {
                match merged.last_mut() {
                    Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
                    _ => merged.push(next),
                }
            }
            merged
        })
        .collect()
}

/// The visits of one GPU, each with the memory below it that others hold while it is there: the lowest gap it fits into.
fn stacked(trace: &Trace, visits: &[Visit], gpu: usize) -> Vec<(usize, f64)> {
    let mut placed: Vec<(usize, f64)> = Vec::new();
    let mut present: Vec<(usize, f64)> = Vec::new();
    for (index, visit) in visits.iter().enumerate().filter(|(_, visit)| visit.gpus.contains(&gpu)) {
        present.retain(|(other, _)| visits[*other].gone_at.is_none_or(|gone| gone > visit.load_at));
        present.sort_by(|a, b| a.1.total_cmp(&b.1));
        let size = |index: usize| trace.models[visits[index].model].gb_per_gpu;
        let mut begin = 0.0;
        for (other, at) in &present {
            if at - begin + 1e-6 >= size(index) {
                break;
            }
            begin = at + size(*other);
        }
        // Gaps may be too small one by one: then it is drawn at the top, over another.
        let begin = f64::min(begin, trace.gpu_gb - size(index));
        present.push((index, begin));
        placed.push((index, begin));
    }
    placed
}

/// The most jobs of a model that wait, for each pixel of the plot's width.
fn most_waiting(trace: &Trace, record: &Record, model: usize, end: f64) -> Vec<usize> {
    let mut changes: Vec<(f64, bool)> = Vec::new();
    for (job, life) in trace.jobs.iter().zip(&record.jobs).filter(|(job, _)| job.model == model) {
        if let Some(until) = life.start_s.or(life.end_s)
            && until > job.arrival_s
        {
            changes.push((job.arrival_s, true));
            changes.push((until, false));
        }
    }
    // Who goes makes room before who comes.
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number of pixels")]
    let (columns, column_of) = (WIDTH as usize, |at: f64| ((at / end * WIDTH) as usize).min(WIDTH as usize - 1));
    let mut most = vec![0; columns];
    let (mut waiting, mut column) = (0_usize, 0);
    for (at, comes) in changes {
        let here = column_of(at);
        while column < here {
            column += 1;
            most[column] = waiting;
        }
        waiting = if comes { waiting + 1 } else { waiting.saturating_sub(1) };
        most[column] = most[column].max(waiting);
    }
    most
}

/// A round step that makes 6 to 14 ticks.
fn tick(end: f64) -> f64 {
    let steps = [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0];
    steps.into_iter().find(|step| end / step <= 14.0).unwrap_or(end / 10.0)
}

/// Hours, minutes and seconds.
fn clock(at: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds of a trace")]
    let s = at.round() as u64;
    format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
