//! A run as one HTML page that opens from disk: nothing is fetched, both themes, wide and narrow.
//!
//! Plots are rows of a grid with marks placed by per cent, so labels wrap and never lie upon each other, whatever the width.

use crate::curve::{self, Curve};
use crate::load::Kind;
use crate::measure;
use crate::result::{Figure, Run, Series, Standing, is_own};
use crate::statistics;
use crate::table::number;
use std::fmt::Write as _;

const STYLE: &str = include_str!("report.css");
/// About as many marks as an axis has.
const TICKS: f64 = 4.0;
/// A value beyond this many times the greatest median is drawn at the edge, as a pointer: one disturbed round must not press
/// all others together.
const AXIS_BEYOND_MEDIAN: f64 = 1.5;

/// The page.
pub fn page(run: &Run) -> String {
    let mut body = String::new();
    let machine = &run.machine;
    let _ = write!(
        body,
        "<h1>tlsplice beside its peers</h1><p>{}, {} cores, {} MiB, Linux {}; kernel TLS: {}.</p><p>{}; {} rounds of {} s, {} \
         worker{}; commit {}; load average {:.2} before and {:.2} after.</p>",
        escaped(&machine.cpu),
        machine.cores,
        machine.memory_mib,
        escaped(&machine.kernel),
        if machine.kernel_tls { "yes" } else { "no" },
        escaped(&run.settings.protection),
        run.settings.rounds,
        run.settings.seconds,
        run.settings.workers,
        if run.settings.workers == 1 { "" } else { "s" },
        escaped(&run.commit),
        machine.load_before,
        machine.load_after,
    );
    if let Some((native, here)) = run.settings.call_ns {
        let _ = write!(
            body,
            "<p>A system call costs {here:.0} ns here and {native:.0} ns on the machine itself; the difference, times the calls \
             that a proxy made, is taken off.</p>"
        );
    }
    let versions = run.versions.iter().map(|(_, version)| escaped(version)).collect::<Vec<_>>().join(" · ");
    let _ = write!(body, "<p class=soft>{versions}</p>");
    body += &summary(run);
    body += &cards(run, "The proxy's own CPU", Figure::Cpu, &[]);
    body += &curve_cards(&Curve::of(run));
    body += &cards(run, "Memory", Figure::Memory, &[]);
    body += &cards(run, "Latency", Figure::P99, &[Kind::Request, Kind::OpenLoop]);
    body += &cards(run, "Rate", Figure::Rate, &[]);
    body += &remarks(run);
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width, initial-scale=1\">\
         <title>tlsplice beside its peers</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn summary(run: &Run) -> String {
    let mut rows = String::new();
    for standing in run.standings() {
        let Standing { factor, range: (low, high), aim, .. } = standing;
        let class = match aim {
            Some(aim) if factor >= aim => "good",
            None if factor >= 1.0 => "",
            Some(_) | None => "bad",
        };
        let _ = write!(
            rows,
            "<tr><td>{}<td>{}<td class={class:?}>{factor:.2}×<td>{}<td>{low:.2} to {high:.2}<td>{}<td>{}<td>{}<td>{}",
            standing.kind.name(),
            standing.ours,
            aim.map_or_else(String::new, |aim| format!("{aim:.1}×")),
            number(standing.cost),
            number(standing.of_best),
            standing.best,
            escaped(standing.figure.unit(standing.kind)),
        );
    }
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "<h2>Against the best peer of each row</h2><p class=soft>Medians of the rounds; the factor is taken round by round, with \
         its least and greatest. Above 1 tlsplice is better.</p><div class=scroll><table><tr><th>work<th>tlsplice as<th>factor\
         <th>aim<th>spread<th>it<th>best peer<th>which<th>unit{rows}</table></div>"
    )
}

/// A row of a plot.
struct Line {
    name: String,
    class: &'static str,
    values: Vec<f64>,
    median: f64,
}

fn cards(run: &Run, title: &str, figure: Figure, only: &[Kind]) -> String {
    let mut cards = String::new();
    for kind in run.kinds().into_iter().filter(|kind| only.is_empty() || only.contains(kind)) {
        if kind.holds_memory() && figure != Figure::Memory {
            continue;
        }
        let mut lines: Vec<Line> = run
            .series
            .iter()
            .filter(|series| series.kind == kind)
            .filter_map(|series| {
                let (values, median) = (series.values(figure), series.median(figure)?);
                let class = if is_own(&series.peer) { "ours" } else { "" };
                Some(Line { name: series.peer.clone(), class, values, median })
            })
            .collect();
        if lines.is_empty() {
            continue;
        }
        if figure == Figure::Cpu {
            lines.extend(floors(run, kind));
        }
        let by = |a: &Line, b: &Line| a.median.total_cmp(&b.median);
        lines.sort_by(|a, b| if figure.less_is_better() { by(a, b) } else { by(b, a) });
        let better = if figure.less_is_better() { "less is better" } else { "more is better" };
        let rate = match (kind, run.settings.open_rate) {
            (Kind::OpenLoop, Some(rate)) => format!(" at {rate:.0} requests/s"),
            _ => String::new(),
        };
        let _ = write!(
            cards,
            "<section class=card><h3>{}</h3><p class=soft>{}{rate}; {better}</p>{}{}</section>",
            heading(kind),
            escaped(figure.unit(kind)),
            plot(&lines),
            doubts(run, kind, figure)
        );
    }
    if cards.is_empty() { cards } else { format!("<h2>{title}</h2><div class=cards>{cards}</div>") }
}

/// What a reader has to know of some series.
fn doubts(run: &Run, kind: Kind, figure: Figure) -> String {
    let those = |is_one: fn(&Series) -> bool| {
        let all: Vec<&Series> = run.series.iter().filter(|series| series.kind == kind).collect();
        let found: Vec<&str> = all.iter().filter(|series| is_one(series)).map(|series| series.peer.as_str()).collect();
        if found.len() == all.len() { "all".into() } else { found.join(", ") }
    };
    let mut text = String::new();
    let mut say = |what: &str, peers: String| {
        if !peers.is_empty() {
            let _ = write!(text, "<p class=soft>{what}: {}</p>", escaped(&peers));
        }
    };
    say("fewer than 9 of 10 connections were resumed", those(|series| !series.is_what_it_says()));
    if figure == Figure::Cpu {
        say("rough, more than half was taken off for system calls", those(Series::is_rough));
    }
    text
}

/// A card for each way and direction: what it costs at each size, as a multiple of userspace's cost.
fn curve_cards(curve: &Curve) -> String {
    let mut cards = String::new();
    for kind in [Kind::Fetch, Kind::Store] {
        for way in curve.ways().into_iter().skip(1) {
            let lines: Vec<Line> = curve
                .sizes(kind)
                .into_iter()
                .filter_map(|bytes| {
                    let values = curve.times_userspace(kind, bytes, way);
                    let median = statistics::median(&values)?;
                    let class = if median < 1.0 { "ours" } else { "" };
                    Some(Line { name: curve::size(bytes), class, values, median })
                })
                .collect();
            if lines.is_empty() {
                continue;
            }
            let told = curve.trade(kind, way).map_or_else(String::new, |trade| curve::told(curve, trade));
            let _ = write!(
                cards,
                "<section class=card><h3>{}: {}</h3><p class=soft>times the CPU of userspace; below 1 it pays</p>{}\
                 <p class=soft>{}</p></section>",
                heading(kind),
                escaped(curve::short(way)),
                plot(&lines),
                escaped(&told)
            );
        }
    }
    if cards.is_empty() {
        cards
    } else {
        format!("<h2>What offloading costs and gains</h2><div class=cards>{cards}</div>")
    }
}

fn floors(run: &Run, kind: Kind) -> Vec<Line> {
    let Some([copy, splice]) = run.limit.as_ref().and_then(measure::floors) else { return Vec::new() };
    let pick = |floor: (f64, f64)| match kind {
        Kind::Down => Some(floor.0),
        Kind::Up => Some(floor.1),
        Kind::Handshake
        | Kind::Resumed
        | Kind::Churn
        | Kind::Request
        | Kind::OpenLoop
        | Kind::Both
        | Kind::Idle
        | Kind::Slow
        | Kind::Mixed
        | Kind::Fetch
        | Kind::Store => None,
    };
    let line = |name: &str, floor| {
        pick(floor).map(|median| Line { name: name.into(), class: "floor", values: vec![median], median })
    };
    [line("copying floor", copy), line("splicing floor", splice)].into_iter().flatten().collect()
}

fn heading(kind: Kind) -> &'static str {
    match kind {
        Kind::Handshake => "New connection with a full handshake and one request",
        Kind::Resumed => "The same with a resumed session",
        Kind::Churn => "Connect, full handshake, 1 KiB, close both ways",
        Kind::Request => "Request of 1 KiB on a kept connection, closed loop",
        Kind::OpenLoop => "The same at a fixed rate, from when each was due",
        Kind::Down => "Bulk to the client",
        Kind::Up => "Bulk to the upstream",
        Kind::Both => "Bulk both ways at once",
        Kind::Idle => "Idle connection",
        Kind::Slow => "Client that reads slowly",
        Kind::Mixed => "Nine requests of 1 KiB and one of 8 MiB, connections of one to four",
        Kind::Fetch => "Connection that takes so many bytes",
        Kind::Store => "Connection that gives so many bytes",
    }
}

fn plot(lines: &[Line]) -> String {
    let greatest = lines.iter().map(|line| line.median).fold(0.0, f64::max);
    let seen = lines.iter().flat_map(|line| &line.values).copied().fold(greatest, f64::max);
    let (top, step) = axis(seen.min(greatest * AXIS_BEYOND_MEDIAN));
    let percent = |value: f64| (value / top * 100.0).clamp(0.0, 100.0);
    let mut text = String::from("<div class=plot>");
    for line in lines {
        let _ = write!(
            text,
            "<div class=\"row {}\"><div class=name>{}</div><div class=track><div class=bar style=\"width:{:.2}%\"></div>",
            line.class,
            escaped(&line.name),
            percent(line.median)
        );
        for value in &line.values {
            let class = if *value > top { "dot out" } else { "dot" };
            let _ = write!(
                text,
                "<i class=\"{class}\" style=\"left:{:.2}%\" title=\"{}\"></i>",
                percent(*value),
                number(*value)
            );
        }
        let _ = write!(
            text,
            "<div class=mid style=\"left:{:.2}%\"></div></div><div class=value>{}</div></div>",
            percent(line.median),
            number(line.median)
        );
    }
    text += "<div class=row><div></div><div class=axis>";
    let count = (top / step).round() as u32;
    for tick in 0..=count {
        let value = f64::from(tick) * step;
        let _ = write!(text, "<span style=\"left:{:.2}%\">{}</span>", percent(value), trimmed(value));
    }
    text + "</div><div></div></div></div>"
}

/// The end of an axis that begins at 0, and the distance of its marks: 1, 2 or 5 times a power of ten.
fn axis(greatest: f64) -> (f64, f64) {
    if greatest <= 0.0 || !greatest.is_finite() {
        return (1.0, 0.5);
    }
    let rough = greatest / TICKS;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough * 0.999);
    let step = step.unwrap_or(power * 10.0);
    ((greatest / step).ceil() * step, step)
}

fn trimmed(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if value >= 10_000.0 {
        return format!("{}k", trimmed(value / 1000.0));
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn remarks(run: &Run) -> String {
    if run.remarks.is_empty() {
        return String::new();
    }
    let items: String = run.remarks.iter().map(|remark| format!("<li>{}", escaped(remark))).collect();
    format!("<h2>Remarks</h2><ul class=soft>{items}</ul>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_past_what_is_drawn_and_has_few_round_marks() {
        for greatest in [0.003, 0.7, 1.0, 19.0, 20.0, 613.0, 99_999.0] {
            let (top, step) = axis(greatest);
            assert!(top >= greatest && top < greatest * 1.7, "{greatest}: {top}");
            assert!((2.0..=6.0).contains(&(top / step).round()), "{greatest}: {top} by {step}");
        }
        assert_eq!(axis(0.0).0, 1.0);
        assert_eq!((trimmed(0.5), trimmed(20.0), trimmed(20_000.0)), ("0.5".into(), "20".into(), "20k".into()));
    }

    #[test]
    fn what_others_wrote_is_not_taken_for_markup() {
        assert_eq!(escaped("<b>&\""), "&lt;b&gt;&amp;&quot;");
    }
}
