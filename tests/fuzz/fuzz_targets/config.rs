//! The configuration: read the same twice, or refused at places that the file has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tlsplice::config::Config;

fuzz_target!(|text: &str| {
    let file = Path::new("fuzz.toml");
    match Config::parse(file, text) {
        Ok(config) => assert!(Config::parse(file, text).is_ok_and(|again| again == config)),
        Err(invalid) => {
            assert!(!invalid.problems().is_empty());
            let lines: Vec<&str> = text.split('\n').collect();
            for problem in invalid.problems() {
                let line = lines.get(problem.line - 1).expect("a line of the file");
                assert!((1..=line.chars().count() + 1).contains(&problem.column), "{problem:?}");
                assert!(!problem.message.is_empty());
            }
            assert!(!invalid.to_string().is_empty());
        }
    }
});
