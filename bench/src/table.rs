//! A run as tables in the terminal: what each peer costs, how fast it is, and how tlsplice stands against the best.

use crate::curve::{self, Curve};
use crate::load::{Kind, Unit};
use crate::measure;
use crate::result::{Figure, OURS, PERCENTILES, Run, Series, Standing};
use crate::statistics;

/// Where and with what it was measured.
pub fn head(run: &Run) -> String {
    let mut text = String::new();
    let machine = &run.machine;
    text += &format!(
        "{}, {} cores, Linux {}, kernel TLS: {}; load {:.2} before, {:.2} after\n{}; {} rounds of {} s, {} worker(s){}\n",
        machine.cpu,
        machine.cores,
        machine.kernel,
        if machine.kernel_tls { "yes" } else { "no" },
        machine.load_before,
        machine.load_after,
        run.settings.protection,
        run.settings.rounds,
        run.settings.seconds,
        run.settings.workers,
        match (&run.settings.proxy_cpus, &run.settings.load_cpus) {
            (Some(proxy), Some(load)) => format!(", proxies on CPU {proxy}, load on {load}"),
            _ => ", not held to CPUs".into(),
        }
    );
    for (name, version) in &run.versions {
        text += &format!("  {name}: {version}\n");
    }
    if let Some((native, here)) = run.settings.call_ns {
        text += &format!("a system call costs {here:.0} ns here, {native:.0} ns on the machine itself: taken off\n");
    }
    text
}

/// All of it.
pub fn show(run: &Run) -> String {
    let mut text = head(run);
    text += &per_peer(run, "The proxy's own CPU (median)", Figure::Cpu);
    text += &per_peer(run, "Rate (median)", Figure::Rate);
    text += &memory(run);
    text += &latency(run);
    text += &versus_best(run);
    text += &limit(run);
    text += &curve::show(&Curve::of(run));
    for remark in &run.remarks {
        text += &format!("remark: {remark}\n");
    }
    text
}

/// Rows padded to columns, the first to the left.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// A number with as many digits as mean something.
pub fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        middle if middle >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn short_unit(figure: Figure, kind: Kind) -> &'static str {
    match (figure, kind.unit()) {
        (Figure::Cpu, Unit::Connection | Unit::Request) | (Figure::P99, _) => "µs",
        (Figure::Cpu, Unit::Byte) => "s/GiB",
        (Figure::Rate, Unit::Connection | Unit::Request) => "/s",
        (Figure::Rate, Unit::Byte) => "MiB/s",
        (Figure::Memory, _) => "KiB",
    }
}

fn per_peer(run: &Run, title: &str, figure: Figure) -> String {
    let kinds: Vec<Kind> = run.kinds().into_iter().filter(|kind| !kind.holds_memory()).collect();
    if kinds.is_empty() {
        return String::new();
    }
    let mut head = vec![String::new()];
    head.extend(kinds.iter().map(|kind| format!("{} {}", kind.name(), short_unit(figure, *kind))));
    let mut rows = vec![head];
    for peer in run.peers() {
        let mut row = vec![peer.to_owned()];
        for kind in &kinds {
            let series = run.series(*kind, peer);
            let value = series.and_then(|series| series.median(figure)).map_or_else(|| "-".into(), number);
            let mark = if series.is_none_or(Series::is_what_it_says) { "" } else { "*" };
            let rough = if figure == Figure::Cpu && series.is_some_and(Series::is_rough) { "~" } else { "" };
            row.push(format!("{rough}{value}{mark}"));
        }
        rows.push(row);
    }
    let starred = rows.iter().flatten().any(|cell| cell.ends_with('*'));
    let rough = rows.iter().flatten().any(|cell| cell.starts_with('~'));
    let mut notes = String::new();
    if starred {
        notes += "* fewer than 9 of 10 connections were resumed\n";
    }
    if rough {
        notes += "~ rough: what was taken off for system calls is more than half of what was measured\n";
    }
    format!("\n{title}\n{}{notes}", aligned(&rows))
}

fn memory(run: &Run) -> String {
    let kinds: Vec<Kind> = [Kind::Idle, Kind::Slow].into_iter().filter(|kind| run.kinds().contains(kind)).collect();
    if kinds.is_empty() {
        return String::new();
    }
    let mut rows = vec![vec![String::new()]];
    for kind in &kinds {
        rows[0].push(format!("{} PSS KiB", kind.name()));
    }
    rows[0].push("idle slab KiB, both ends".into());
    for peer in run.peers() {
        let mut row = vec![peer.to_owned()];
        for kind in &kinds {
            let value = run.series(*kind, peer).and_then(|series| series.median(Figure::Memory));
            row.push(value.map_or_else(|| "-".into(), number));
        }
        let slab = run.series(Kind::Idle, peer).and_then(|series| {
            let values: Vec<f64> = series.rounds.iter().filter_map(|r| r.slab_per_connection).collect();
            statistics::median(&values)
        });
        row.push(slab.map_or_else(|| "-".into(), |bytes| number(bytes / 1024.0)));
        rows.push(row);
    }
    format!("\nMemory per connection (median)\n{}", aligned(&rows))
}

fn latency(run: &Run) -> String {
    let mut text = String::new();
    for kind in [Kind::Request, Kind::OpenLoop] {
        if !run.kinds().contains(&kind) {
            continue;
        }
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(PERCENTILES.iter().map(|name| format!("{name} µs")));
        for peer in run.peers() {
            let Some(series) = run.series(kind, peer) else { continue };
            let mut row = vec![peer.to_owned()];
            for at in 0..PERCENTILES.len() {
                let values: Vec<f64> = series.rounds.iter().filter_map(|r| Some(r.latency_us?[at])).collect();
                row.push(statistics::median(&values).map_or_else(|| "-".into(), number));
            }
            rows.push(row);
        }
        let how = match (kind, run.settings.open_rate) {
            (Kind::OpenLoop, Some(rate)) => format!("open loop, {rate:.0} requests/s, from when each was due"),
            _ => "closed loop".into(),
        };
        text += &format!("\nLatency of a request, {how} (median of the rounds)\n{}", aligned(&rows));
    }
    text
}

/// Each of our variants against the best peer of each row, round by round.
pub fn versus_best(run: &Run) -> String {
    let mut rows =
        vec![["", "", "ours", "best peer", "", "times better", "spread", "aim", ""].map(String::from).to_vec()];
    for standing in run.standings() {
        let Standing { factor, range: (low, high), aim, .. } = standing;
        let verdict = match aim {
            Some(aim) if factor >= aim => "reached",
            Some(_) if factor < 1.0 => "LOSES",
            Some(_) => "missed",
            None if factor < 1.0 => "LOSES",
            None => "",
        };
        rows.push(vec![
            standing.kind.name().into(),
            if standing.ours == OURS { String::new() } else { standing.ours.trim_start_matches("tlsplice-").into() },
            number(standing.cost),
            number(standing.of_best),
            standing.best.into(),
            format!("{factor:.2}"),
            format!("{low:.2}..{high:.2}"),
            aim.map_or_else(String::new, |aim| format!("{aim:.1}")),
            verdict.into(),
        ]);
    }
    if rows.len() == 1 {
        return String::new();
    }
    format!(
        "\ntlsplice against the best peer: CPU, memory of idle and of slow, p99 in the open loop\n{}",
        aligned(&rows)
    )
}

fn limit(run: &Run) -> String {
    let Some(limit) = &run.limit else { return String::new() };
    let Some([copy, splice]) = measure::floors(limit) else { return String::new() };
    let cipher = statistics::median(&limit.cipher).unwrap_or(0.0);
    let mut rows = vec![["s CPU per GiB", "down", "up"].map(String::from).to_vec()];
    let mut row = |name: &str, (down, up): (f64, f64)| rows.push(vec![name.into(), number(down), number(up)]);
    row("plain relay that copies, and the cipher", copy);
    row("plain relay that splices, and the cipher (the floor with kernel TLS)", splice);
    for ours in run.own() {
        let value = |kind| run.series(kind, ours).and_then(|s| s.median(Figure::Cpu));
        if let (Some(down), Some(up)) = (value(Kind::Down), value(Kind::Up)) {
            row(ours, (down, up));
            row("  times the copying floor", (down / copy.0, up / copy.1));
            row("  times the splicing floor", (down / splice.0, up / splice.1));
        }
    }
    format!("\nThe limit of this machine (AES-256-GCM on 16 KiB: {} s per GiB)\n{}", number(cipher), aligned(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::sample::requests;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["a".to_owned(), "µs".to_owned()], vec!["bbb".to_owned(), "1234".to_owned()]];
        assert_eq!(aligned(&rows), "a      µs\nbbb  1234\n");
        assert_eq!(
            (number(1234.5), number(12.34), number(1.234), number(0.1234)),
            ("1234".into(), "12.3".into(), "1.23".into(), "0.123".into())
        );
    }

    #[test]
    fn aims_are_judged_on_machines_and_not_in_user_mode_linux() {
        let mut run = requests(&[(15.0, 20.0), (15.1, 20.1)]);
        assert!(versus_best(&run).contains("reached"));
        run.settings.call_ns = Some((60.0, 900.0));
        let shown = versus_best(&run);
        assert!(shown.contains("1.33") && !shown.contains("reached"), "{shown}");
    }
}
