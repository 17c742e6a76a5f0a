//! Runs every test against the program that TLSPLICE_BIN names. See `lib.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tlsplice_tests::run::main()
}
