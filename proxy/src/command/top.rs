//! `tlsplice top`: rates and live connections, for a person; once, for a script.
//!
//!   pinned maps, every second ─▶ two readings ─▶ rates ─┐
//!   admin endpoint, /connections (if it answers) ───────┴▶ View ─▶ screen, or lines
//!
//! It only reads. Without an admin endpoint the sums alone are shown, and it says so.

mod ask;
mod model;
mod screen;

use super::show;
use crate::config::Config;
use crate::exit::{FINE, Failure};
use crate::observe::ebpf;
use model::{Shown, View};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two readings.
const INTERVAL: Duration = Duration::from_secs(1);

/// What the command line says.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Tells `server.admin` and `metrics.pins`, if it can be read.
    pub config: &'a Path,
    pub pins: Option<PathBuf>,
    pub admin: Option<SocketAddr>,
    pub once: bool,
}

/// # Errors
/// `Host`: there are no maps, or the terminal does not do as it is told.
pub fn top(wanted: &Wanted<'_>) -> Result<u8, Failure> {
    let config = std::fs::read_to_string(wanted.config).ok().and_then(|text| Config::parse(wanted.config, &text).ok());
    let of_config = config.as_ref();
    let pins = wanted.pins.clone().or_else(|| of_config.map(|c| c.metrics.pins.clone()));
    let admin = wanted.admin.or_else(|| of_config.and_then(|c| c.server.admin));
    let maps = ebpf::open(&pins.unwrap_or_else(|| PathBuf::from(ebpf::PINS))).map_err(Failure::Host)?;
    let mut view = View::new();
    let read = |view: &mut View| -> Result<(), Failure> {
        let reading = maps.read().map_err(|e| Failure::Host(format!("read the pinned maps: {e}")))?;
        let told = admin.map(ask::connections);
        view.take(Instant::now(), reading, told);
        Ok(())
    };
    read(&mut view)?;
    if wanted.once {
        std::thread::sleep(INTERVAL);
        read(&mut view)?;
        show(&screen::lines(&view));
        return Ok(FINE);
    }
    let mut terminal = ratatui::try_init().map_err(|e| Failure::Host(format!("set up the terminal: {e}")))?;
    let ended = watch(&mut terminal, &mut view, read);
    ratatui::restore();
    ended.map(|()| FINE)
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    read: impl Fn(&mut View) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let trouble = |e: std::io::Error| Failure::Host(format!("terminal: {e}"));
    let mut next = Instant::now() + INTERVAL;
    loop {
        terminal.draw(|frame| screen::draw(frame, view)).map_err(trouble)?;
        let now = Instant::now();
        if now >= next {
            next = now + INTERVAL;
            if !view.paused {
                read(view)?;
            }
            continue;
        }
        if !event::poll(next - now).map_err(trouble)? {
            continue;
        }
        if let Event::Key(key) = event::read().map_err(trouble)?
            && key.kind == KeyEventKind::Press
        {
            let interrupted = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
            if interrupted || obey(view, key.code) == Ended::Yes {
                return Ok(());
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Yes,
    No,
}

fn obey(view: &mut View, key: KeyCode) -> Ended {
    if view.typing {
        match key {
            KeyCode::Enter => view.typing = false,
            KeyCode::Esc => {
                view.typing = false;
                view.filter.clear();
            }
            KeyCode::Backspace => drop(view.filter.pop()),
            KeyCode::Char(c) => view.filter.push(c),
            _ => {}
        }
        return Ended::No;
    }
    match key {
        KeyCode::Char('q') | KeyCode::Esc => return Ended::Yes,
        KeyCode::Char('p' | ' ') => view.paused = !view.paused,
        KeyCode::Char('s') => view.sort = view.sort.next(),
        KeyCode::Char('/') => view.typing = true,
        KeyCode::Tab => view.shown = view.shown.next(),
        KeyCode::Char('1') => view.shown = Shown::All,
        KeyCode::Down | KeyCode::Char('j') => view.scroll = view.scroll.saturating_add(1),
        KeyCode::Up | KeyCode::Char('k') => view.scroll = view.scroll.saturating_sub(1),
        _ => {}
    }
    Ended::No
}
