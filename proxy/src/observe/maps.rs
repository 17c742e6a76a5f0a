//! The pinned maps, opened: which row stands for what, and what the rows have come to.
//!
//!   labels ─▶ row (found, or named under the folder's lock) ─▶ sockets' storage        rows ─▶ sums over CPUs ─▶ Reading
//!
//! The names are pinned beside the sums, so that a later process, or `tlsplice metrics` without any, knows what they
//! mean. A row is never given another meaning; when all are taken the rest goes to the row for others.

use crate::sys::bpf::{self, Plain, Runs, Shape};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tlsplice_ebpf::{
    CLASSES, ClassName, ClassSums, ENDPOINTS, EndpointName, Handshake, Histogram, OTHER_CLASS, Socket, Sums, Text,
    WORDS, WordName,
};

/// The pin of the program, for its figures.
pub const PROGRAM_PIN: &str = "PROGRAM";

/// The pins of one layout.
#[derive(Debug)]
pub struct Maps {
    sockets: OwnedFd,
    handshakes: OwnedFd,
    endpoints: OwnedFd,
    classes: OwnedFd,
    endpoint_names: OwnedFd,
    class_names: OwnedFd,
    words: OwnedFd,
    word_names: OwnedFd,
    /// The program that counts now, if it is pinned.
    program: Option<OwnedFd>,
    cpus: usize,
    /// The folder. Whoever names a row holds its lock, against other processes.
    folder: File,
    rows: Mutex<Rows>,
}

/// The names that this process has seen, in the order of the rows.
#[derive(Debug, Default)]
struct Rows {
    endpoints: Table<EndpointName>,
    classes: Table<ClassName>,
    words: Table<WordName>,
}

#[derive(Debug)]
struct Table<N> {
    known: u32,
    rows: HashMap<N, u32>,
}

impl<N> Default for Table<N> {
    fn default() -> Self {
        Self { known: 0, rows: HashMap::new() }
    }
}

/// What the kernel has counted, at one moment.
#[derive(Debug, Default)]
pub struct Reading {
    /// Of the program; none unless the kernel is told to count them.
    pub runs: Runs,
    pub endpoints: Vec<(EndpointName, Sums)>,
    pub classes: Vec<(ClassName, ClassSums)>,
}

impl Maps {
    /// Opens the pins in `folder`.
    ///
    /// # Errors
    /// What is missing, may not be opened, or has another shape than this layout.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let pin = |name: &str, shape: Option<Shape>| {
            let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", folder.join(name).display()));
            let map = bpf::open_pin(&folder.join(name)).map_err(named)?;
            match shape {
                Some(wanted) if bpf::shape(map.as_fd()).map_err(named)? != wanted => {
                    Err(named(io::Error::other("the pinned map has another layout than this program")))
                }
                Some(_) | None => Ok(map),
            }
        };
        let maps = Self {
            sockets: pin("SOCKETS", Some(Shape::of::<Socket>(0)))?,
            handshakes: pin("HANDSHAKES", Some(Shape::of::<Handshake>(0)))?,
            endpoints: pin("ENDPOINTS", Some(Shape::of::<Sums>(ENDPOINTS)))?,
            classes: pin("CLASSES", Some(Shape::of::<ClassSums>(CLASSES)))?,
            endpoint_names: pin("ENDPOINT_NAMES", Some(Shape::of::<EndpointName>(ENDPOINTS)))?,
            class_names: pin("CLASS_NAMES", Some(Shape::of::<ClassName>(CLASSES)))?,
            words: pin("USER_WORDS", Some(Shape::of::<u64>(WORDS)))?,
            word_names: pin("USER_NAMES", Some(Shape::of::<WordName>(WORDS)))?,
            program: bpf::open_pin(&folder.join(PROGRAM_PIN)).ok(),
            cpus: possible_cpus()?,
            folder: File::open(folder)?,
            rows: Mutex::default(),
        };
        Ok(maps)
    }

    /// Gives the rows for others their names, where they have none yet.
    pub fn name_reserved_rows(&self) {
        let other = Text::<8>::new("other");
        let endpoint = EndpointName {
            side: Text::new("other"),
            listener: Text::new("other"),
            upstream: Text::new("other"),
            server: Text::new("other"),
        };
        let _ = self.endpoint(&endpoint);
        let none = ClassName {
            used: Text::new("yes"),
            server_name: Text::EMPTY,
            version: Text::EMPTY,
            suite: Text::EMPTY,
            group: Text::EMPTY,
            resumed: Text::EMPTY,
            offload: Text::EMPTY,
        };
        let _ = self.class(&none);
        let _ = self.class(&ClassName {
            used: none.used,
            server_name: Text::new("other"),
            version: Text::new("other"),
            suite: Text::new("other"),
            group: Text::new("other"),
            resumed: other,
            offload: Text::new("other"),
        });
    }

    /// The row of a listener or a server.
    pub fn endpoint(&self, name: &EndpointName) -> u32 {
        let row = self.row(self.endpoint_names.as_fd(), name, ENDPOINTS, |rows| &mut rows.endpoints);
        row.unwrap_or(0)
    }

    /// The row of a combination.
    pub fn class(&self, name: &ClassName) -> u32 {
        self.row(self.class_names.as_fd(), name, CLASSES, |rows| &mut rows.classes).unwrap_or(OTHER_CLASS)
    }

    /// From here on the program counts a socket that is not established yet. The children of a listener inherit it.
    ///
    /// # Errors
    /// The kernel has no memory for it; the socket is not counted then.
    pub fn begin(&self, fd: BorrowedFd<'_>, socket: Socket) -> io::Result<()> {
        bpf::update_socket(self.sockets.as_fd(), fd, &socket)
    }

    /// What the handshake of a client gave, as a row.
    ///
    /// # Errors
    /// As `begin`; it stays in the class that it had.
    pub fn classify(&self, client: BorrowedFd<'_>, class: u32) -> io::Result<()> {
        bpf::update_socket(self.handshakes.as_fd(), client, &Handshake { class, padding: 0 })
    }

    /// Everything that the kernel has counted.
    ///
    /// # Errors
    /// A map cannot be read, which no kernel refuses once it is open.
    pub fn read(&self) -> io::Result<Reading> {
        let (endpoints, classes) = self.names()?;
        let runs = self.program.as_ref().and_then(|program| bpf::runs(program.as_fd()).ok()).unwrap_or_default();
        let mut reading = Reading { runs, ..Reading::default() };
        for (row, name) in endpoints {
            let each = bpf::lookup_each_cpu::<Sums>(self.endpoints.as_fd(), row, self.cpus)?;
            reading.endpoints.push((name, each.iter().fold(ZERO_SUMS, add_sums)));
        }
        for (row, name) in classes {
            let each = bpf::lookup_each_cpu::<ClassSums>(self.classes.as_fd(), row, self.cpus)?;
            reading.classes.push((name, each.iter().fold(ZERO_CLASS, add_class)));
        }
        Ok(reading)
    }

    /// The counts that user space has kept, by sample.
    ///
    /// # Errors
    /// As `read`.
    pub fn kept(&self) -> io::Result<HashMap<String, u64>> {
        let mut rows = self.rows();
        rows.words.look(self.word_names.as_fd(), WORDS)?;
        let words = rows.words.rows.iter();
        words.map(|(name, row)| Ok((name.as_str().to_owned(), bpf::lookup(self.words.as_fd(), *row)?))).collect()
    }

    /// Adds to the kept counts. A sample that finds no word is not kept.
    ///
    /// # Errors
    /// As `read`.
    pub fn keep(&self, rises: &[(String, u64)]) -> io::Result<()> {
        let _locked = Locked::new(&self.folder)?;
        let mut rows = self.rows();
        for (sample, rise) in rises.iter().filter(|(sample, _)| sample.len() <= size_of::<WordName>()) {
            let row = rows.words.find(self.word_names.as_fd(), &WordName::new(sample), WORDS)?;
            if let Some(row) = row {
                let before: u64 = bpf::lookup(self.words.as_fd(), row)?;
                bpf::update(self.words.as_fd(), row, &before.wrapping_add(*rise))?;
            }
        }
        Ok(())
    }

    fn row<N: Name>(
        &self,
        names: BorrowedFd<'_>,
        name: &N,
        limit: usize,
        table: impl Fn(&mut Rows) -> &mut Table<N>,
    ) -> Option<u32> {
        let mut rows = self.rows();
        let table = table(&mut rows);
        if let Some(row) = table.rows.get(name) {
            return Some(*row);
        }
        let _locked = Locked::new(&self.folder).ok()?;
        table.find(names, name, limit).ok()?
    }

    fn names(&self) -> io::Result<(Numbered<EndpointName>, Numbered<ClassName>)> {
        let mut rows = self.rows();
        rows.endpoints.look(self.endpoint_names.as_fd(), ENDPOINTS)?;
        rows.classes.look(self.class_names.as_fd(), CLASSES)?;
        Ok((rows.endpoints.sorted(), rows.classes.sorted()))
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        // A holder that panicked has left whole entries.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows with their names.
type Numbered<N> = Vec<(u32, N)>;

/// A key that is stored as it is.
trait Name: Plain + Eq + std::hash::Hash {
    fn is_free(&self) -> bool;
}

impl Name for EndpointName {
    fn is_free(&self) -> bool {
        self.side.is_empty()
    }
}

impl Name for ClassName {
    fn is_free(&self) -> bool {
        self.used.is_empty()
    }
}

impl Name for WordName {
    fn is_free(&self) -> bool {
        self.is_empty()
    }
}

impl<N: Name> Table<N> {
    /// Takes up what others have named meanwhile.
    fn look(&mut self, names: BorrowedFd<'_>, limit: usize) -> io::Result<()> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        while self.known < limit {
            let name: N = bpf::lookup(names, self.known)?;
            if name.is_free() {
                break;
            }
            self.rows.insert(name, self.known);
            self.known += 1;
        }
        Ok(())
    }

    /// The row of that name, which becomes its own if it has none. `None`: all are taken.
    fn find(&mut self, names: BorrowedFd<'_>, name: &N, limit: usize) -> io::Result<Option<u32>> {
        if let Some(row) = self.rows.get(name) {
            return Ok(Some(*row));
        }
        self.look(names, limit)?;
        if let Some(row) = self.rows.get(name) {
            return Ok(Some(*row));
        }
        if usize::try_from(self.known).is_ok_and(|known| known >= limit) {
            return Ok(None);
        }
        let row = self.known;
        bpf::update(names, row, name)?;
        self.rows.insert(*name, row);
        self.known += 1;
        Ok(Some(row))
    }

    fn sorted(&self) -> Numbered<N> {
        let mut rows: Numbered<N> = self.rows.iter().map(|(name, row)| (*row, *name)).collect();
        rows.sort_unstable_by_key(|(row, _)| *row);
        rows
    }
}

/// The lock of the folder, held until it is dropped.
#[derive(Debug)]
pub struct Locked<'a>(&'a File);

impl<'a> Locked<'a> {
    /// Waits for it.
    ///
    /// # Errors
    /// flock(2) failed.
    pub fn new(folder: &'a File) -> io::Result<Self> {
        folder.lock()?;
        Ok(Self(folder))
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Closing the file would let go of it too.
        let _ = self.0.unlock();
    }
}

/// CPUs that this kernel might ever have: as many values a per-CPU map has.
fn possible_cpus() -> io::Result<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = list.trim().rsplit([',', '-']).next().and_then(|n| n.parse::<usize>().ok());
    last.map(|n| n + 1).ok_or_else(|| io::Error::other(format!("/sys/devices/system/cpu/possible: {list:?}")))
}

const ZERO_HISTOGRAM: Histogram = Histogram { sum: 0, buckets: [0; tlsplice_ebpf::BUCKETS] };
pub(super) const ZERO_SUMS: Sums = Sums {
    opened: 0,
    closed: 0,
    refused: 0,
    reset: 0,
    bytes_in: 0,
    bytes_out: 0,
    retransmits: 0,
    duration: ZERO_HISTOGRAM,
    rtt: ZERO_HISTOGRAM,
    first_ack: ZERO_HISTOGRAM,
};
pub(super) const ZERO_CLASS: ClassSums =
    ClassSums { opened: 0, closed: 0, live: 0, bytes_in: 0, bytes_out: 0, retransmits: 0 };

fn add_sums(to: Sums, more: &Sums) -> Sums {
    Sums {
        opened: to.opened.wrapping_add(more.opened),
        closed: to.closed.wrapping_add(more.closed),
        refused: to.refused.wrapping_add(more.refused),
        reset: to.reset.wrapping_add(more.reset),
        bytes_in: to.bytes_in.wrapping_add(more.bytes_in),
        bytes_out: to.bytes_out.wrapping_add(more.bytes_out),
        retransmits: to.retransmits.wrapping_add(more.retransmits),
        duration: add_histogram(to.duration, &more.duration),
        rtt: add_histogram(to.rtt, &more.rtt),
        first_ack: add_histogram(to.first_ack, &more.first_ack),
    }
}

fn add_histogram(mut to: Histogram, more: &Histogram) -> Histogram {
    to.sum = to.sum.wrapping_add(more.sum);
    for (to, more) in to.buckets.iter_mut().zip(more.buckets) {
        *to = to.wrapping_add(more);
    }
    to
}

fn add_class(to: ClassSums, more: &ClassSums) -> ClassSums {
    ClassSums {
        opened: to.opened.wrapping_add(more.opened),
        closed: to.closed.wrapping_add(more.closed),
        live: to.live.wrapping_add(more.live),
        bytes_in: to.bytes_in.wrapping_add(more.bytes_in),
        bytes_out: to.bytes_out.wrapping_add(more.bytes_out),
        retransmits: to.retransmits.wrapping_add(more.retransmits),
    }
}
