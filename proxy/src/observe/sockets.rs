//! What a worker says of its sockets: whose they are, and what the handshake gave.
//!
//!   listener bound ─▶ begin (its children inherit it)      connect ─▶ begin      handshake, door ─▶ classify
//!
//! Endpoints and classes are rows of the pinned maps; each worker remembers which it has used. What the kernel does not
//! see (unix sockets, or everything where it does not count) is counted here, under the same names.

use super::counters::{Count, Decline, Label};
use super::live::Live;
use super::maps::Maps;
use crate::config::{Listener, Mode, ServerAddress};
use rustls::{CipherSuite, NamedGroup, ProtocolVersion};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use tlsplice_ebpf::{ClassName, EndpointName, Socket, Text};

/// Server names that are told apart; a further one is "other". They are those of the certificates, so that no client
/// can fill the table.
const SERVER_NAMES: usize = 256;
/// What stands for the names that found no place.
const OTHER: &str = "other";

/// A peer, as it is labelled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    Listener(SocketAddr),
    Server { upstream: String, server: ServerAddress },
}

impl Endpoint {
    pub fn side(&self) -> &'static str {
        match self {
            Self::Listener(_) => "client",
            Self::Server { .. } => "upstream",
        }
    }

    pub fn name(&self) -> EndpointName {
        let side = Text::new(self.side());
        match self {
            Self::Listener(address) => EndpointName {
                side,
                listener: Text::new(&address.to_string()),
                upstream: Text::EMPTY,
                server: Text::EMPTY,
            },
            Self::Server { upstream, server } => {
                let server = match server {
                    ServerAddress::Tcp(address) => address.to_string(),
                    ServerAddress::Unix(path) => format!("unix:{}", path.display()),
                };
                let (upstream, server) = (Text::new(upstream), Text::new(&server));
                EndpointName { side, listener: Text::EMPTY, upstream, server }
            }
        }
    }
}

/// What a handshake gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    pub name: ServerName,
    pub version: ProtocolVersion,
    pub suite: CipherSuite,
    pub group: Option<NamedGroup>,
    pub resumed: bool,
}

impl Hash for Facts {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // rustls' enums have numbers and no hash.
        let group = self.group.map(u16::from);
        (self.name, u16::from(self.version), u16::from(self.suite), group, self.resumed).hash(state);
    }
}

/// Where the records are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    Userspace,
    Kernel,
    Declined(Decline),
}

impl Place {
    pub fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Kernel => "kernel",
            Self::Declined(why) => why.name(),
        }
    }
}

/// A name in the table of names. 0 is none, 1 is "other".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServerName(u16);

static NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl ServerName {
    pub const NONE: Self = Self(0);

    /// The place of a certificate's name that a client has asked for; `None`: of one that no certificate has.
    pub fn of(known: Option<&str>) -> Self {
        let Some(known) = known else { return Self(1) };
        let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        let at = names.iter().position(|name| name == known).or_else(|| {
            (names.len() < SERVER_NAMES).then(|| {
                names.push(known.to_owned());
                names.len() - 1
            })
        });
        at.and_then(|at| u16::try_from(at + 2).ok()).map_or(Self(1), Self)
    }

    pub fn text(self) -> String {
        match self.0 {
            0 => String::new(),
            1 => OTHER.to_owned(),
            n => {
                let names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
                names.get(usize::from(n) - 2).cloned().unwrap_or_default()
            }
        }
    }
}

pub fn version_name(version: ProtocolVersion) -> &'static str {
    match version {
        ProtocolVersion::TLSv1_3 => "TLS1.3",
        ProtocolVersion::TLSv1_2 => "TLS1.2",
        _ => OTHER,
    }
}

/// The IANA name.
pub fn suite_name(suite: CipherSuite) -> String {
    suite.as_str().map_or_else(|| OTHER.to_owned(), |name| name.replacen("TLS13_", "TLS_", 1))
}

/// As the configuration calls it.
pub fn group_name(group: Option<NamedGroup>) -> &'static str {
    match group {
        None => "",
        Some(NamedGroup::secp256r1) => "P-256",
        Some(NamedGroup::secp384r1) => "P-384",
        Some(group) => group.as_str().unwrap_or(OTHER),
    }
}

/// What user space counts of a peer.
#[derive(Debug, Default)]
pub struct UserSums {
    pub opened: Count,
    pub closed: Count,
    pub refused: Count,
    pub bytes_in: Count,
    pub bytes_out: Count,
}

/// Of one worker, for whoever renders it.
pub type UserEndpoints = Mutex<HashMap<Endpoint, Arc<UserSums>>>;

/// One worker's.
pub struct Sockets {
    maps: Option<Arc<Maps>>,
    counted: Arc<UserEndpoints>,
    endpoints: RefCell<HashMap<Endpoint, Known>>,
    classes: RefCell<HashMap<(Facts, Place), u32>>,
    /// Those that are established.
    pub live: Live,
}

#[derive(Clone)]
struct Known {
    row: u32,
    sums: Option<Arc<UserSums>>,
}

/// A peer that user space counts, if it does: before its connection is open.
#[derive(Debug)]
pub struct Peer(Option<Arc<UserSums>>);

impl Peer {
    /// The connection is open.
    pub fn opened(self) -> Tally {
        if let Some(sums) = &self.0 {
            sums.opened.add(1);
        }
        Tally(self.0)
    }

    /// It came to nothing.
    pub fn refused(self) {
        if let Some(sums) = &self.0 {
            sums.refused.add(1);
        }
    }
}

/// A socket that user space counts, if it does: open as long as this lives.
#[derive(Debug, Default)]
pub struct Tally(Option<Arc<UserSums>>);

impl Tally {
    /// `bytes_in` came from the peer.
    pub fn moved(&self, bytes_in: u64, bytes_out: u64) {
        if let Some(sums) = &self.0 {
            sums.bytes_in.add(bytes_in);
            sums.bytes_out.add(bytes_out);
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        if let Some(sums) = &self.0 {
            sums.closed.add(1);
        }
    }
}

impl Sockets {
    pub fn new(maps: Option<Arc<Maps>>, counted: Arc<UserEndpoints>) -> Self {
        Self { maps, counted, endpoints: RefCell::default(), classes: RefCell::default(), live: Live::default() }
    }

    /// A client's connection, which is counted as its listener's already.
    pub fn accepted(&self, listener: SocketAddr) -> Tally {
        if self.maps.is_some() {
            return Tally::default();
        }
        Peer(self.known(Endpoint::Listener(listener)).sums).opened()
    }

    /// Begins to count a socket that is about to connect.
    pub fn connecting(&self, socket: BorrowedFd<'_>, upstream: &str, server: &ServerAddress) -> Peer {
        let known = self.known(Endpoint::Server { upstream: upstream.to_owned(), server: server.clone() });
        let is_tcp = matches!(server, ServerAddress::Tcp(_));
        if let (Some(maps), true) = (&self.maps, is_tcp) {
            // Without memory for it the connection goes uncounted.
            let _ = maps.begin(socket, Socket::new(known.row, false));
        }
        Peer(known.sums)
    }

    /// A connect that this host has refused before it began, which the kernel's hook has not seen.
    pub fn not_begun(&self, upstream: &str, server: &ServerAddress) {
        let endpoint = Endpoint::Server { upstream: upstream.to_owned(), server: server.clone() };
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.entry(endpoint).or_default().refused.add(1);
    }

    /// Says what the handshake gave, and again when the door has decided.
    pub fn classify(&self, client: BorrowedFd<'_>, facts: Facts, place: Place) {
        let Some(maps) = &self.maps else { return };
        let class =
            *self.classes.borrow_mut().entry((facts, place)).or_insert_with(|| maps.class(&class(facts, place)));
        // As in `connecting`: it stays in the class that it had.
        let _ = maps.classify(client, class);
    }

    fn known(&self, endpoint: Endpoint) -> Known {
        if let Some(known) = self.endpoints.borrow().get(&endpoint) {
            return known.clone();
        }
        let is_unix = matches!(endpoint, Endpoint::Server { server: ServerAddress::Unix(_), .. });
        let row = match &self.maps {
            Some(maps) if !is_unix => maps.endpoint(&endpoint.name()),
            Some(_) | None => 0,
        };
        let sums = (is_unix || self.maps.is_none()).then(|| {
            let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.entry(endpoint.clone()).or_default().clone()
        });
        let known = Known { row, sums };
        self.endpoints.borrow_mut().insert(endpoint, known.clone());
        known
    }
}

/// Begins to count what a socket will accept, before it listens: its children are counted from their first moment on.
pub fn begin_listener(maps: &Maps, socket: BorrowedFd<'_>, listener: &Listener) -> std::io::Result<()> {
    let endpoint = maps.endpoint(&Endpoint::Listener(listener.address).name());
    let has_handshake = match listener.mode {
        Mode::Tcp(_) | Mode::Http(_) => true,
        Mode::Redirect => false,
    };
    maps.begin(socket, Socket::new(endpoint, has_handshake))
}

fn class(facts: Facts, place: Place) -> ClassName {
    ClassName {
        used: Text::new("yes"),
        server_name: Text::new(&facts.name.text()),
        version: Text::new(version_name(facts.version)),
        suite: Text::new(&suite_name(facts.suite)),
        group: Text::new(group_name(facts.group)),
        resumed: Text::new(if facts.resumed { "yes" } else { "no" }),
        offload: Text::new(place.name()),
    }
}
