//! All tests, by topic.

pub mod bulk;
pub mod certificates;
pub mod closing;
pub mod commands;
pub mod counted_modes;
pub mod counting_cost;
pub mod counting_refused;
pub mod door;
pub mod drain;
pub mod faults;
pub mod first_request;
pub mod grading;
pub mod http_bodies;
pub mod http_hostile;
pub mod http_limits;
pub mod http_programs;
pub mod http_requests;
pub mod http_smuggling;
pub mod idle;
pub mod java;
pub mod kernel_metrics;
pub mod key_update;
pub mod limits;
pub mod network_share;
pub mod nonces;
pub mod peers;
pub mod policy;
pub mod privileges;
pub mod programs;
pub mod prometheus;
pub mod real_clients;
pub mod reload;
pub mod resumption;
pub mod slow_readers;
pub mod stalled_readers;
pub mod stapling;
pub mod trickle;

use crate::environment::Environment;
use crate::run::Test;

/// In the order in which they run.
pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(peers::tests(env));
    tests.extend(real_clients::tests(env));
    tests.extend(java::tests(env));
    tests.extend(bulk::tests(env));
    tests.extend(first_request::tests(env));
    tests.extend(door::tests(env));
    tests.extend(key_update::tests(env));
    tests.extend(closing::tests(env));
    tests.extend(slow_readers::tests(env));
    tests.extend(faults::tests(env));
    tests.extend(limits::tests(env));
    tests.extend(nonces::tests(env));
    tests.extend(trickle::tests(env));
    tests.extend(reload::tests(env));
    tests.extend(policy::tests(env));
    tests.extend(resumption::tests(env));
    tests.extend(certificates::tests(env));
    tests.extend(network_share::tests(env));
    tests.extend(stapling::tests(env));
    tests.extend(grading::tests(env));
    tests.extend(drain::tests(env));
    tests.extend(privileges::tests(env));
    tests.extend(commands::tests(env));
    tests.extend(counted_modes::tests(env));
    tests.extend(kernel_metrics::tests(env));
    tests.extend(counting_refused::tests(env));
    tests.extend(counting_cost::tests(env));
    tests.extend(prometheus::tests(env));
    tests.extend(stalled_readers::tests(env));
    tests.extend(idle::tests(env));
    tests.extend(http_requests::tests(env));
    tests.extend(http_smuggling::tests(env));
    tests.extend(http_hostile::tests(env));
    tests.extend(http_limits::tests(env));
    tests.extend(http_bodies::tests(env));
    tests.extend(http_programs::tests(env));
    tests
}
