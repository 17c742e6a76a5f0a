//! Staples: one for each chain, from the file beside it or from its responder.
//!
//!   file beside the chain ─good?─▶ staple            past half of its life ─▶ responder ─▶ verified, newer ─▶ file, for the fleet
//!                         └─no─▶ responder, with back-off
//!
//!   each second: what has ended is stapled no more, whether a check runs or hangs
//!
//! Whatever is not good and current is not stapled. A certificate without a responder misses nothing: that is normal.
//! Runs on the control thread; `check` asks files and responders without holding it up.

mod check;

use super::start::Terminator;
use super::upkeep::jittered;
use crate::config::{Ocsp, Tls};
use crate::tls::certificates::{Certificates, Served};
use crate::tls::judge::Shape;
use crate::tls::ocsp::{self, Staple};
use crate::tls::source::STAPLE_ENDING;
use crate::tls::x509::Seen;
use check::{Asked, Checked, Files, Item, check};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinHandle;

/// The longest wait before a responder that fails is asked again: ten minutes by default.
const RETRY_MAX_POLLS: u32 = 60;
const RETRY_FIRST_POLLS: u32 = 3;
/// A staple that ends within so many polls is not stapled any more.
const MARGIN_POLLS: u32 = 2;
/// Nor one that ends before the next look, for times are whole seconds.
const MARGIN_SECONDS: u64 = super::LOOK_AFTER.as_secs();

/// What is known of one certificate's staple.
#[derive(Default)]
struct Known {
    staple: Option<Staple>,
    /// Questions in a row that have brought nothing of use.
    failures: u32,
    not_before: Option<Instant>,
    said: Option<String>,
}

/// By the leaf's serial and key.
type Id = Vec<u8>;

/// All of them.
#[derive(Default)]
pub(super) struct Staples {
    known: HashMap<Id, Known>,
    files: Files,
}

/// What lies beside chains, by the staple's file.
pub(super) type Answers = HashMap<PathBuf, Vec<u8>>;

fn id(leaf: &Seen) -> Id {
    [leaf.serial.as_slice(), &leaf.key_info].concat()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What ends by then is not stapled.
fn horizon(poll: Duration) -> u64 {
    now() + (poll * MARGIN_POLLS).as_secs() + MARGIN_SECONDS
}

/// The certificate that issued the leaf, if it is in the chain.
fn issuer(served: &Served) -> Option<&Seen> {
    Shape::of(&served.chain).path.get(1).map(|place| &served.chain[*place])
}

fn staple_file(chain: &Path) -> PathBuf {
    let mut name = chain.as_os_str().to_owned();
    name.push(".");
    name.push(STAPLE_ENDING);
    PathBuf::from(name)
}

/// The one that ends later; of two that end with their certificate, the later one.
fn newer(one: Option<Staple>, other: Option<Staple>) -> Option<Staple> {
    one.into_iter().chain(other).max_by_key(Staple::times)
}

/// Reads what lies beside these chains. Blocks on the file system.
pub(super) fn beside<'a>(chains: impl Iterator<Item = &'a Path>) -> Answers {
    let read = |file: PathBuf| check::read(&file).ok().map(|answer| (file, answer));
    chains.map(staple_file).filter_map(read).collect()
}

/// The same for all that are served.
pub(super) fn beside_all(certificates: &Certificates, mode: Ocsp) -> Answers {
    let wanted = certificates.served().iter().filter(|_| mode != Ocsp::Off);
    beside(wanted.map(|served| served.certificate_file.as_path()))
}

impl Staples {
    /// Puts to certificates that were read anew the better of what is known and what lies beside them.
    pub(super) fn put_to(&mut self, certificates: Certificates, answers: &Answers, tls: &Tls) -> Certificates {
        if tls.ocsp == Ocsp::Off {
            return certificates;
        }
        for served in certificates.served() {
            let Some((leaf, issuer)) = served.chain.first().zip(issuer(served)) else { continue };
            let answer = answers.get(&staple_file(&served.certificate_file));
            let beside = answer.and_then(|answer| ocsp::verify(answer, leaf, issuer, now()).ok());
            let known = self.known.entry(id(leaf)).or_default();
            known.staple = newer(known.staple.take(), beside);
        }
        let staples = self.of(&certificates, horizon(tls.poll));
        certificates.with_staples(&staples)
    }

    /// Whether there was any.
    fn drop_ended(&mut self, horizon: u64) -> bool {
        let ended = |known: &mut Known| known.staple.take_if(|staple| staple.next_update <= horizon);
        self.known.values_mut().filter_map(ended).count() > 0
    }

    /// For each certificate the staple that lasts beyond the horizon.
    fn of(&self, certificates: &Certificates, horizon: u64) -> Vec<Option<Vec<u8>>> {
        let of_one = |served: &Served| {
            let staple = self.known.get(&id(served.chain.first()?))?.staple.as_ref()?;
            (staple.next_update > horizon).then(|| staple.der.clone())
        };
        certificates.served().iter().map(of_one).collect()
    }

    /// What is to be looked after.
    fn items(&self, certificates: &Certificates, mode: Ocsp) -> Vec<Item> {
        let item = |served: &Served| {
            let leaf = served.chain.first()?.clone();
            let known = self.known.get(&id(&leaf));
            let waits = known.and_then(|known| known.not_before).is_some_and(|time| Instant::now() < time);
            Some(Item {
                id: id(&leaf),
                issuer: issuer(served)?.clone(),
                file: staple_file(&served.certificate_file),
                held: known.and_then(|known| known.staple.clone()),
                may_fetch: mode == Ocsp::Auto && !waits,
                leaf,
            })
        };
        certificates.served().iter().filter(|_| mode != Ocsp::Off).filter_map(item).collect()
    }

    /// Keeps what a check has found, and decides when to ask again.
    fn settle(&mut self, checked: Vec<Checked>, poll: Duration) {
        let horizon = horizon(poll);
        for Checked { id, staple, asked } in checked {
            let known = self.known.entry(id).or_default();
            // One that a reload has found meanwhile may be the newer.
            known.staple = newer(known.staple.take(), staple).filter(|staple| staple.next_update > horizon);
            match asked {
                Asked::Nobody => {}
                Asked::Newer => {
                    tracing::info!("ocsp: a fresh staple");
                    known.said = None;
                    if known.staple.as_ref().is_some_and(|staple| now() < staple.half_life()) {
                        (known.failures, known.not_before) = (0, None);
                    } else {
                        known.back_off(poll);
                    }
                }
                Asked::InVain(reason) => {
                    known.back_off(poll);
                    if known.said.as_ref() != Some(&reason) {
                        tracing::warn!(reason, has_staple = known.staple.is_some(), "ocsp: no fresh staple");
                        known.said = Some(reason);
                    }
                }
            }
        }
    }
}

impl Known {
    fn back_off(&mut self, poll: Duration) {
        self.failures += 1;
        let polls = RETRY_FIRST_POLLS.saturating_mul(2_u32.saturating_pow(self.failures.min(20)));
        self.not_before = Some(Instant::now() + jittered(poll * polls.min(RETRY_MAX_POLLS)));
    }
}

impl Terminator {
    /// Looks after all staples, without holding anything up.
    pub(super) fn check_staples(&self) -> JoinHandle<Vec<Checked>> {
        let items = self.staples.items(&self.certificates, self.config.tls.ocsp);
        tokio::spawn(check(items, self.staples.files.clone()))
    }

    /// Serves what has changed.
    pub(super) fn checked_staples(&mut self, checked: Vec<Checked>) {
        if self.config.tls.ocsp == Ocsp::Off {
            // They were asked for before a reload that wants none.
            return;
        }
        self.staples.settle(checked, self.config.tls.poll);
        self.serve_staples();
    }

    /// Serves no longer what has ended.
    pub(super) fn drop_ended_staples(&mut self) {
        if self.staples.drop_ended(horizon(self.config.tls.poll)) {
            self.serve_staples();
        }
    }

    /// Gives the workers the staples that are good now, if that changes anything.
    fn serve_staples(&mut self) {
        let wanted = self.staples.of(&self.certificates, horizon(self.config.tls.poll));
        let served = self.certificates.served().iter().map(|served| &served.certified.ocsp);
        if served.eq(wanted.iter()) {
            return;
        }
        let stapled = wanted.iter().flatten().count();
        let certificates = self.certificates.clone().with_staples(&wanted);
        match self.serve(certificates) {
            Ok(()) => tracing::info!(stapled, of = wanted.len(), "ocsp: staples have changed"),
            Err(error) => tracing::error!(%error, "ocsp: staples could not be served"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Policy;
    use crate::tls::ocsp::testing::{Party, good};
    use crate::tls::policy;
    use rustls::pki_types::PrivateKeyDer;

    /// A chain with its issuer, from no file.
    fn chain() -> (Party, Certificates) {
        let authority = Party::authority();
        let leaf = authority.issue(rcgen::CertificateParams::new(vec!["a.test".to_owned()]).expect("a DNS name"));
        let key = PrivateKeyDer::try_from(leaf.key.serialize_der()).expect("PKCS#8");
        let der = vec![leaf.certificate.der().clone(), authority.certificate.der().clone()];
        (authority, Certificates::from_der(der, key).expect("a pair"))
    }

    fn is_stapled(certificates: &Certificates) -> bool {
        certificates.served()[0].certified.ocsp.is_some()
    }

    #[test]
    fn what_ends_soon_is_put_to_no_certificate_whether_it_was_held_or_lies_beside_it() {
        let (authority, certificates) = chain();
        let tls = policy::tests::tls(Policy::APlus, &[], &[]);
        let (leaf, issuer) = (&certificates.served()[0].chain[0], &certificates.served()[0].chain[1]);
        let margin = horizon(tls.poll) - now();
        let beside = |left: u64| {
            let answer = good(leaf, issuer, [now() - 60, now() + left], &authority.key, None);
            Answers::from([(staple_file(Path::new("")), answer)])
        };
        let mut staples = Staples::default();
        assert!(!is_stapled(&staples.put_to(certificates.clone(), &beside(margin - 5), &tls)));
        assert!(is_stapled(&staples.put_to(certificates.clone(), &beside(margin + 60), &tls)));
        // It is known now, and time passes.
        assert!(is_stapled(&staples.put_to(certificates.clone(), &Answers::new(), &tls)));
        assert!(!staples.drop_ended(horizon(tls.poll)));
        let known = staples.known.get_mut(&id(leaf)).and_then(|known| known.staple.as_mut()).expect("known");
        known.next_update = now() + 1;
        assert!(!is_stapled(&staples.put_to(certificates.clone(), &Answers::new(), &tls)));
    }

    #[test]
    fn an_older_answer_replaces_none_and_one_past_its_half_life_is_not_asked_for_at_every_poll() {
        let (_, certificates) = chain();
        let poll = Duration::from_secs(10);
        let leaf = &certificates.served()[0].chain[0];
        let staple = |from: u64, to: u64| Staple { der: vec![1], this_update: now() - from, next_update: now() + to };
        let checked = |staple: &Staple, asked| vec![Checked { id: id(leaf), staple: Some(staple.clone()), asked }];
        let may_ask = |staples: &Staples| staples.items(&certificates, Ocsp::Auto)[0].may_fetch;
        let mut staples = Staples::default();
        let (old, late, fresh) = (staple(2000, 100), staple(1000, 200), staple(0, 900));
        staples.settle(checked(&late, Asked::Newer), poll);
        assert!(!may_ask(&staples), "what came is past its half already");
        staples.settle(checked(&old, Asked::Nobody), poll);
        assert_eq!(staples.items(&certificates, Ocsp::Auto)[0].held.as_ref(), Some(&late));
        staples.settle(checked(&fresh, Asked::Newer), poll);
        assert!(may_ask(&staples));
        staples.settle(checked(&fresh, Asked::InVain("nothing".to_owned())), poll);
        assert!(!may_ask(&staples));
    }
}
