//! Draws the view: tables on a terminal, or the same tables as lines.

use super::model::{Rates, Shown, View};
use crate::observe::live::Connection;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use std::fmt::Write;

const PEER_HEADS: [&str; 8] = ["side", "listener or server", "live", "new/s", "in/s", "out/s", "rtt", "retr/s"];
const NAME_HEADS: [&str; 8] = ["", "server name", "live", "new/s", "in/s", "out/s", "", "retr/s"];
const PEER_WIDTHS: [u16; 8] = [8, 24, 7, 7, 8, 8, 7, 6];
const CONNECTION_HEADS: [&str; 8] = ["peer", "server name", "suite", "records", "in", "out", "rtt", "age"];
/// By how much names may be wider where there is room; further right the figures would be far from them.
const NAME_GROWTH: u16 = 40;
const CONNECTION_WIDTHS: [u16; 8] = [21, 14, 8, 9, 6, 6, 6, 5];

pub fn draw(frame: &mut Frame<'_>, view: &View) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(3), Constraint::Length(1)]).areas(frame.area());
    let state = if view.paused { "paused" } else { "live" };
    let filter =
        if view.filter.is_empty() && !view.typing { String::new() } else { format!("  filter: {}", view.filter) };
    let title = format!("tlsplice top  {state}  sorted by {}{filter}", view.sort.name());
    frame.render_widget(Paragraph::new(Line::styled(title, Style::new().add_modifier(Modifier::REVERSED))), head);
    let keys = if view.typing {
        "type to filter   Enter keeps it   Esc forgets it"
    } else {
        "q quit   p pause   s sort   / filter   Tab tables   arrows scroll"
    };
    frame.render_widget(Paragraph::new(keys), foot);
    let (peers, names) = (rate_rows(&view.peers()), rate_rows(&view.names()));
    let connections = connection_rows(&view.connections());
    match view.shown {
        Shown::All => {
            let fair = |rows: usize| u16::try_from(rows + 2).unwrap_or(u16::MAX).min((body.height / 3).max(4));
            let areas = Layout::vertical([
                Constraint::Length(fair(peers.len())),
                Constraint::Length(fair(names.len())),
                Constraint::Min(3),
            ]);
            let [top, middle, bottom] = areas.areas(body);
            table(frame, top, (&PEER_HEADS, &PEER_WIDTHS), peers, 0);
            table(frame, middle, (&NAME_HEADS, &PEER_WIDTHS), names, 0);
            connection_table(frame, bottom, view, connections);
        }
        Shown::Peers => table(frame, body, (&PEER_HEADS, &PEER_WIDTHS), peers, view.scroll),
        Shown::Names => table(frame, body, (&NAME_HEADS, &PEER_WIDTHS), names, view.scroll),
        Shown::Connections => connection_table(frame, body, view, connections),
    }
}

fn connection_table(frame: &mut Frame<'_>, area: Rect, view: &View, rows: Vec<[String; 8]>) {
    match &view.untold {
        Some(why) => frame.render_widget(Paragraph::new(format!("connections: {why}")), area),
        None => table(frame, area, (&CONNECTION_HEADS, &CONNECTION_WIDTHS), rows, view.scroll),
    }
}

fn table(
    frame: &mut Frame<'_>,
    area: Rect,
    (heads, widths): (&[&'static str; 8], &[u16; 8]),
    rows: Vec<[String; 8]>,
    scroll: usize,
) {
    let head = Row::new(heads.map(Cell::from)).style(Style::new().add_modifier(Modifier::BOLD));
    let scroll = scroll.min(rows.len().saturating_sub(1));
    let rows = rows.into_iter().skip(scroll).map(|cells| Row::new(cells.map(Cell::from)));
    // What a wide terminal has more goes to the second column, the name.
    let used: u16 = widths.iter().sum::<u16>() + 7;
    let more = area.width.saturating_sub(used).min(NAME_GROWTH);
    let widths = (0..).zip(widths).map(|(n, width)| Constraint::Length(if n == 1 { width + more } else { *width }));
    frame.render_widget(Table::new(rows, widths).header(head).column_spacing(1), area);
}

/// The tables as lines, for a script: columns apart by two blanks, a head each.
pub fn lines(view: &View) -> String {
    let mut text = String::new();
    write_table(&mut text, &PEER_HEADS, &rate_rows(&view.peers()));
    write_table(&mut text, &NAME_HEADS, &rate_rows(&view.names()));
    match &view.untold {
        // Writing to a String fails never.
        Some(why) => drop(writeln!(text, "connections: {why}")),
        None => write_table(&mut text, &CONNECTION_HEADS, &connection_rows(&view.connections())),
    }
    text
}

fn write_table(text: &mut String, heads: &[&str; 8], rows: &[[String; 8]]) {
    let heads = heads.map(str::to_owned);
    let all = || std::iter::once(&heads).chain(rows);
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    for row in all() {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text.push('\n');
}

fn rate_rows(rates: &[&Rates]) -> Vec<[String; 8]> {
    let side = |r: &Rates| if r.side == "name" { String::new() } else { r.side.clone() };
    rates
        .iter()
        .map(|r| {
            [
                side(r),
                r.name.clone(),
                r.live.to_string(),
                format!("{:.0}", r.opened),
                size(r.bytes_in),
                size(r.bytes_out),
                r.rtt_us.map_or_else(String::new, time),
                format!("{:.0}", r.retransmits),
            ]
        })
        .collect()
}

fn connection_rows(connections: &[&Connection]) -> Vec<[String; 8]> {
    connections
        .iter()
        .map(|c| {
            [
                c.peer.clone(),
                c.server_name.clone(),
                short_suite(&c.suite),
                c.offload.clone(),
                size(c.bytes_in as f64),
                size(c.bytes_out as f64),
                time(f64::from(c.rtt_us)),
                age(c.age_seconds),
            ]
        })
        .collect()
}

/// `A256-GCM`: what tells suites apart in eight columns.
fn short_suite(suite: &str) -> String {
    if suite.contains("CHACHA20") {
        "CHACHA20".to_owned()
    } else if suite.contains("AES_256") {
        "A256-GCM".to_owned()
    } else if suite.contains("AES_128") {
        "A128-GCM".to_owned()
    } else {
        suite.to_owned()
    }
}

/// Three digits and a unit of 1024.
fn size(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "K", "M", "G", "T"] {
        if value < 999.5 {
            return if unit == "B" || value >= 9.95 {
                format!("{value:.0}{unit}")
            } else {
                format!("{value:.1}{unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.0}P")
}

fn time(microseconds: f64) -> String {
    match microseconds {
        us if us < 999.5 => format!("{us:.0}us"),
        us if us < 999_500.0 => format!("{:.1}ms", us / 1e3),
        us => format!("{:.1}s", us / 1e6),
    }
}

fn age(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.0}s"),
        s if s < 3_600.0 => format!("{:.0}m", s / 60.0),
        s if s < 86_400.0 => format!("{:.0}h", s / 3_600.0),
        s => format!("{:.0}d", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_fit_their_columns() {
        assert_eq!([0.0, 999.0, 1000.0, 1536.0, 1e9].map(size), ["0B", "999B", "1.0K", "1.5K", "954M"]);
        assert_eq!([5.0, 1_500.0, 2e6].map(time), ["5us", "1.5ms", "2.0s"]);
        assert_eq!([5.0, 125.0, 7_300.0, 200_000.0].map(age), ["5s", "2m", "2h", "2d"]);
        assert_eq!(short_suite("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"), "A128-GCM");
    }
}
