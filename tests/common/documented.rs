//! The names of JSON fields, as the manual has them and as a command really prints them.

use std::collections::BTreeSet;

use serde_json::Value;

const MANUAL: &str = include_str!("../../docs/USER.md");

/// The words in backticks of the row of a command in the table of JSON documents.
fn documented(command: &str) -> BTreeSet<&'static str> {
    let table = MANUAL.split("| command | document |").nth(1).expect("the table of documents");
    let is_row = |line: &&str| {
        let cell = line.trim_start_matches('|').split('|').next().unwrap_or_default();
        cell.split('`').any(|word| word == command)
    };
    let row = table.lines().find(is_row).unwrap_or_else(|| panic!("no row of {command}"));
    // Between the first and the second backtick, the third and the fourth, ...
    row.split('`').skip(1).step_by(2).collect()
}

/// The names of all fields of a document.
pub(crate) fn names(document: &Value) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    match document {
        Value::Object(fields) => {
            for (name, value) in fields {
                all.insert(name.clone());
                all.extend(names(value));
            }
        }
        Value::Array(items) => items.iter().for_each(|item| all.extend(names(item))),
        _ => {}
    }
    all
}

/// What of these documents of a command the manual leaves out, and what it tells of that they do not have: the latter but for
/// `elsewhere`, which are words for values, and fields that only other cases have. Rows of `beside` are referred to.
pub(crate) fn assert_documented(command: &str, beside: &[&str], documents: &[&Value], elsewhere: &[&str]) {
    let seen: BTreeSet<String> = documents.iter().flat_map(|document| names(document)).collect();
    let row = documented(command);
    let known: BTreeSet<&str> =
        beside.iter().flat_map(|command| documented(command)).chain(row.iter().copied()).collect();
    let left_out: Vec<_> = seen.iter().filter(|name| !known.contains(name.as_str())).collect();
    assert!(left_out.is_empty(), "{command}: not in the manual: {left_out:?}");
    let of_error = ["error", "kind", "message", "causes", "remedy"];
    let is_known = |word: &&&str| {
        seen.contains(**word)
            || elsewhere.contains(*word)
            || of_error.contains(*word)
            || **word == command
            || beside.contains(*word)
    };
    let vanished: Vec<_> = row.iter().filter(|word| !is_known(word)).collect();
    assert!(vanished.is_empty(), "{command}: in the manual only: {vanished:?}");
}
