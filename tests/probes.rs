//! Goal: tracers find the probes that the manual promises, each with its arguments.
//! Method: reads the notes of the program as they do, and the table of the manual.

use std::collections::BTreeMap;

use object::{Object, ObjectSection};

/// Of a note (`NT_STAPSDT`).
const NOTE_TYPE: u32 = 3;

struct Probe {
    location: u64,
    semaphore: u64,
    provider: String,
    name: String,
    arguments: Vec<String>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Header, owner, description; each padded to four bytes.
fn probes(section: &[u8]) -> Vec<Probe> {
    let mut probes = Vec::new();
    let mut at = 0;
    while at < section.len() {
        let [owner_len, len] = [0, 4].map(|offset| u32_at(section, at + offset) as usize);
        assert_eq!(
            (u32_at(section, at + 8), &section[at + 12..at + 12 + owner_len]),
            (NOTE_TYPE, &b"stapsdt\0"[..])
        );
        let begin = at + 12 + owner_len.next_multiple_of(4);
        let description = &section[begin..begin + len];
        let mut texts =
            description[24..].split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
        let mut text = || texts.next().expect("three texts");
        let (provider, name, arguments) = (text(), text(), text());
        probes.push(Probe {
            location: u64_at(description, 0),
            semaphore: u64_at(description, 16),
            provider,
            name,
            arguments: arguments.split_whitespace().map(str::to_owned).collect(),
        });
        at = begin + len.next_multiple_of(4);
    }
    probes
}

/// Name and number of arguments of each probe in the manual. A text has two: where it is, and its length.
fn promised() -> BTreeMap<String, usize> {
    let manual = include_str!("../docs/USER.md");
    let (_, section) = manual.split_once("### Probes for tracers").expect("a section");
    let (section, _) = section.split_once("\n## ").expect("one more");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let (name, rest) = row.split_once('`').expect("a name");
        let arguments = rest.trim_end_matches(" |").rsplit_once("| ").expect("the last column").1;
        (
            name.to_owned(),
            arguments.split([',']).map(|argument| 1 + argument.matches(" and its length").count()).sum(),
        )
    })
    .collect()
}

#[test]
fn the_program_has_the_probes_of_the_manual() {
    let bytes = std::fs::read(env!("CARGO_BIN_EXE_fastice")).expect("the program");
    let elf = object::File::parse(&*bytes).expect("ELF");
    let notes = elf.section_by_name(".note.stapsdt").expect("probes");
    let range = |name| {
        let section = elf.section_by_name(name).expect("it is there");
        section.address()..section.address() + section.size()
    };
    let (text, semaphores) = (range(".text"), range(".probes"));
    let mut found = BTreeMap::new();
    for probe in probes(notes.data().expect("bytes")) {
        assert_eq!(probe.provider, "fastice");
        assert!(text.contains(&probe.location) && semaphores.contains(&probe.semaphore), "{}", probe.name);
        // A word, and where it is: a register.
        let sound = probe.arguments.iter().all(|argument| argument.starts_with("-8@%"));
        assert!(sound, "{}: {:?}", probe.name, probe.arguments);
        // A probe may be in several places, after inlining.
        let count = probe.arguments.len();
        assert_eq!(*found.entry(probe.name.clone()).or_insert(count), count, "{}", probe.name);
    }
    let promised = promised();
    assert!(promised.len() >= 7, "{promised:?}");
    assert_eq!(found, promised);
}
