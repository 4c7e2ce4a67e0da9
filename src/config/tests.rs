//! Goal: an operator's mistake is answered with its place, reason and remedy, and never with a surprise.
//! Method: small texts, the whole error text compared.

use super::*;

const MINIMAL: &str = r#"
[[listener]]
address = "127.0.0.1:4420"
[[subsystem]]
nqn = "nqn.2026-11.io.fastice:vm1"
allow_any_host = true
[[subsystem.namespace]]
file = "/srv/vm1.img"
"#;

fn host() -> HostFacts {
    HostFacts { allowed_cores: vec![0, 1, 4] }
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse_for(text, "t.toml", &host())
}

fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|error| panic!("{error}"))
}

fn bad(text: &str) -> String {
    parse(text).expect_err("must be refused").to_string()
}

/// Reasons alone, without excerpts.
fn reasons(text: &str) -> Vec<String> {
    let error = parse(text).expect_err("must be refused");
    error.problems().iter().map(|problem| format!("{}: {}", problem.line, problem.reason)).collect()
}

fn with(namespace: &str) -> String {
    MINIMAL.replace("file = \"/srv/vm1.img\"", namespace)
}

#[test]
fn defaults_are_filled_in() {
    let config = good(MINIMAL);
    assert_eq!(config.state_dir, PathBuf::from(DEFAULT_STATE_DIR));
    assert_eq!(config.cores, [0, 1, 4]);
    assert_eq!(config.buffer_memory, DEFAULT_BUFFER_MEMORY);
    assert_eq!(config.poll, PollMode::Adaptive { idle_after: DEFAULT_IDLE_AFTER, linger: DEFAULT_LINGER });
    let subsystem = &config.subsystems[0];
    assert_eq!(subsystem.model, "fastice");
    assert_eq!(subsystem.serial.len(), 20);
    assert_eq!(subsystem.hosts, Hosts::Any);
    let namespace = &subsystem.namespaces[0];
    assert_eq!((namespace.nsid, namespace.read_only, namespace.block_size), (1, false, None));
    let path = PathBuf::from("/srv/vm1.img");
    assert_eq!(
        namespace.backing,
        Backing::File {
            path,
            device: DeviceWay::Uring,
            prepare: false,
            update_mtime: false,
            guard: None,
            local_readers: None
        }
    );
    assert_eq!(config.files().collect::<Vec<_>>(), [(Path::new("/srv/vm1.img"), false)]);
}

#[test]
fn the_sample_in_deploy_is_good() {
    let text = include_str!("../../deploy/fastice.toml.example");
    let config = good(text);
    assert!(!config.subsystems.is_empty());
    // A key that is a comment has its default, but for these two, which say so.
    let uncommented = |line: &str| match line.strip_prefix("# ") {
        Some(key) if key.contains(" = ") && !key.starts_with("cores") && !key.starts_with("strict") => {
            key.to_owned()
        }
        _ => line.to_owned(),
    };
    let (keys, rest) = text.split_once("# [metrics]").expect("tables come after the keys");
    let keys: Vec<_> = keys.lines().map(uncommented).collect();
    assert!(keys.iter().filter(|line| line.contains(" = ") && !line.starts_with('#')).count() > 7);
    assert_eq!(good(&format!("{}\n# [metrics]{rest}", keys.join("\n"))), config);
}

#[test]
fn what_needs_a_start_is_compared_with_what_runs_and_not_with_the_last_file() {
    let running = good(MINIMAL);
    for text in [
        "state_dir = \"/srv/state\"",
        "cores = 1",
        "buffer_memory = \"8MiB\"",
        "poll = \"always\"",
        "linger_us = 5",
        "gather_us = 5",
        "watch_cpu_percent = 2.0",
        "strict = true",
        "log_format = \"json\"",
        "idle_after_us = 5",
        "[metrics]\nlisten = \"127.0.0.1:9464\"",
        "[[listener]]\naddress = \"127.0.0.1:4421\"",
        "IDENTITY",
    ] {
        let asked = match text {
            "IDENTITY" => MINIMAL.replace("allow_any_host", "serial = \"S2\"\nallow_any_host"),
            _ => format!("{text}\n{MINIMAL}"),
        };
        let asked = good(&asked);
        let pending = Config::changes(&running, &asked).restart;
        assert_eq!(pending.len(), 1, "{text}");
        let kept = asked.clone().keeping(&running);
        assert_eq!(Config::changes(&kept, &asked).restart, pending, "{text}: still to come");
        assert!(Config::changes(&kept, &running).is_empty(), "{text}: as it runs");
    }
}

#[test]
fn every_key_is_read() {
    let config = good(
        r#"
state_dir = "/run/fi"
cores = [4, 0]
buffer_memory = "128MiB"
poll = "always"
log = "debug"
log_format = "json"
[[listener]]
address = "[::1]:0"
advertise = "10.0.9.1"
congestion_control = "dctcp"
[[listener]]
address = "0.0.0.0:8009"
discovery_only = true
[[subsystem]]
nqn = "nqn.2026-11.io.fastice:a"
serial = "S1"
model = "M 1"
hosts = ["nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555"]
[[subsystem.namespace]]
memory = "1MiB"
[[subsystem.namespace]]
nsid = 1
null = 8192
block_size = 512
read_only = true
[[subsystem.namespace]]
nsid = 7
file = "/a//./b"
device = "uring"
prepare = true
guard = "swap-file"
local_readers = "allow"
"#,
    );
    assert_eq!(config.cores, [0, 4]);
    assert_eq!(config.buffer_memory, ByteLen(128 << 20));
    assert_eq!(config.poll, PollMode::Always);
    assert_eq!((config.log, config.log_format), (LogLevel::Debug, LogFormat::Json));
    assert_eq!(config.listeners[0].advertise, Some("10.0.9.1".parse().expect("an address")));
    assert_eq!(config.listeners[0].congestion_control.as_deref(), Some("dctcp"));
    assert!(config.listeners[1].discovery_only);
    let namespaces = &config.subsystems[0].namespaces;
    assert_eq!(namespaces.iter().map(|ns| ns.nsid).collect::<Vec<_>>(), [1, 2, 7]);
    assert_eq!(namespaces[0].backing, Backing::Null { len: ByteLen(8192) });
    assert_eq!(namespaces[0].block_size, Some(BlockSize::B512));
    assert_eq!(namespaces[1].backing, Backing::Memory { len: ByteLen(1 << 20) });
    let path = PathBuf::from("/a/b");
    assert_eq!(
        namespaces[2].backing,
        Backing::File {
            path,
            device: DeviceWay::Uring,
            prepare: true,
            update_mtime: false,
            guard: Some(GuardMode::SwapFile),
            local_readers: Some(LocalReaders::Allow),
        }
    );
}

#[test]
fn controllers_are_named_by_their_way_and_may_have_to_say_who_they_are() {
    let config = good(&format!(
        r#"
[[nvme]]
pci = "0000:01:00.0"
serial = "S4EVNX0R123456"
nsid = 1
[[nvme]]
vfio_user = "/run//vfio.sock"
nguid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
[[nvme]]
model = "/dev/loop0"
eui64 = "00 25 38 ab cd ef 01 23"
[[nvme]]
pci = "03:00.1"
unsafe_no_iommu = true
[[nvme]]
serial = "S4EVNX0R654321"
{}"#,
        with("file = \"/srv/vm1.img\"\ndevice = \"nvme\"")
    ));
    let ways: Vec<String> =
        config.nvme.iter().flat_map(|choice| &choice.way).map(ToString::to_string).collect();
    let without = "0000:03:00.1 without IOMMU";
    assert_eq!(ways, ["0000:01:00.0", "vfio-user /run/vfio.sock", "model of /dev/loop0", without]);
    let [first, second, third, _, anywhere] = &config.nvme[..] else { panic!("{:?}", config.nvme) };
    assert_eq!((first.identity.serial.as_deref(), first.identity.nsid), (Some("S4EVNX0R123456"), Some(1)));
    assert_eq!(second.identity.nguid.map(|id| id[0]), Some(0x6B));
    assert_eq!(third.identity.eui64.map(|id| id[7]), Some(0x23));
    assert!(anywhere.way.is_none() && anywhere.identity.serial.is_some());
    let path = PathBuf::from("/srv/vm1.img");
    let backing = &config.subsystems[0].namespaces[0].backing;
    assert_eq!(
        *backing,
        Backing::File {
            path,
            device: DeviceWay::Nvme,
            prepare: false,
            update_mtime: false,
            guard: None,
            local_readers: None
        }
    );
}

#[test]
fn what_a_guard_does_not_go_with_is_refused() {
    let file = |rest: &str| with(&format!("file = \"/srv/vm1.img\"\n{rest}"));
    let found = reasons(&file("guard = \"read-only-mount\"\nprepare = true\nupdate_mtime = true"));
    let told = found.join("\n");
    assert!(
        found.len() == 2
            && told.contains("prepare takes a filesystem")
            && told.contains("update_mtime takes"),
        "{told}"
    );
    let model = format!(
        "[[nvme]]\nmodel = \"/dev/loop0\"\n{}",
        file("guard = \"swap-file\"\ndevice = \"handed-over\"")
    );
    let told = reasons(&model).join("\n");
    assert!(told.contains("guard works while the filesystem is mounted"), "{told}");
    let unmounted = "device = \"unmounted\"\nguard = \"default\"\nlocal_readers = \"allow\"\nprepare = true\nupdate_mtime = true";
    assert_eq!(reasons(&file(unmounted)).len(), 4, "all of them take a mounted filesystem");
    good(&file("device = \"unmounted\""));
    assert!(bad(&file("guard = \"lock\"")).contains("frozen-filesystem"), "the words are told");
    for guard in GuardMode::ALL {
        let config = good(&file(&format!("guard = \"{guard}\"")));
        let Backing::File { guard: found, .. } = &config.subsystems[0].namespaces[0].backing else {
            panic!()
        };
        assert_eq!(*found, Some(guard));
    }
}

#[test]
fn controllers_that_cannot_be_meant_are_refused() {
    let found = reasons(&format!(
        r#"
[[nvme]]
nsid = 1
[[nvme]]
pci = "0000:01:00.0"
model = "/dev/loop0"
[[nvme]]
pci = "nvme0"
[[nvme]]
model = "loop0"
nguid = "0000"
eui64 = "00000000-00000000"
nsid = 0
[[nvme]]
vfio_user = "/run/../x"
serial = "longer than twenty bytes"
unsafe_no_iommu = true
[[nvme]]
pci = "01:00.0"
[[nvme]]
pci = "0000:01:00.0"
{MINIMAL}"#
    ));
    let digits = |key: &str, digits| {
        format!("{key} has {digits} hexadecimal digits, not all zero, as /sys/block/nvme*/ shows them")
    };
    assert_eq!(
        found,
        [
            "2: a controller has a place (pci, vfio_user or model) or an identity (nguid, eui64 or serial)"
                .to_owned(),
            "4: a controller has one of pci, vfio_user and model, not several".to_owned(),
            "8: `nvme0` is no PCI address: write 0000:01:00.0".to_owned(),
            "10: model must be an absolute path without `..`".to_owned(),
            format!("11: {}", digits("nguid", 32)),
            format!("12: {}", digits("eui64", 16)),
            "13: nsid 0 is not that of a namespace".to_owned(),
            "15: vfio_user must be an absolute path without `..`".to_owned(),
            "16: serial has 1 to 20 printable ASCII characters, no blank at its ends".to_owned(),
            "17: unsafe_no_iommu has a meaning for pci only".to_owned(),
            "20: 0000:01:00.0 is named twice".to_owned(),
        ]
    );
}

#[test]
fn a_file_by_our_driver_needs_a_controller() {
    let found = reasons(&with("file = \"/srv/vm1.img\"\ndevice = \"nvme\""));
    let expected = "9: no [[nvme]]: name the controller to drive, such as pci = \"0000:01:00.0\"";
    assert_eq!(found, [expected]);
}

#[test]
fn other_controllers_are_looked_at_from_now_on() {
    let old = good(MINIMAL);
    let new = good(&format!("[[nvme]]\nmodel = \"/dev/loop0\"\n{MINIMAL}"));
    let changes = Config::changes(&old, &new);
    assert_eq!(changes.live, [LiveChange::Controllers(new.nvme.clone())]);
    assert_eq!(changes.restart, []);
    let shared = good(&format!("[[nvme]]\nvfio_user = \"/run/vfio.sock\"\n{MINIMAL}"));
    assert_eq!(Config::changes(&old, &shared).restart, [RestartReason::SharedBuffers]);
    assert_eq!(Config::changes(&shared, &old).restart, []);
}

#[test]
fn an_error_shows_its_place() {
    let text = MINIMAL.replace(
        "allow_any_host = true",
        "allow_any_host = true\nserial = \"way too long for a serial number\"",
    );
    insta::assert_snapshot!(bad(&text), @r#"
    t.toml:7:10: serial has 1 to 20 printable ASCII characters, no blank at its ends
     7 | serial = "way too long for a serial number"
       |          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
}

#[test]
fn an_unknown_key_shows_its_place_and_what_there_is() {
    insta::assert_snapshot!(bad(&MINIMAL.replace("allow_any_host", "alow_any_host")), @r"
    t.toml:6:1: unknown field `alow_any_host`, expected one of `nqn`, `serial`, `model`, `allow_any_host`, `hosts`, `namespace`
     6 | alow_any_host = true
       | ^^^^^^^^^^^^^
    ");
}

#[test]
fn a_wrong_type_and_broken_toml_show_their_place() {
    insta::assert_snapshot!(bad("cores = \"two\""), @r#"
    t.toml:1:9: invalid type: string "two", expected a number of cores, or a list of core numbers such as [0, 1]
     1 | cores = "two"
       |         ^^^^^
    "#);
    assert!(bad("a = [1,").starts_with("t.toml:1:"));
}

#[test]
fn how_long_a_core_polls_on_is_told_in_microseconds() {
    let polls = |text: &str| parse(&format!("{text}{MINIMAL}")).map(|config| config.poll);
    assert_eq!(
        polls("linger_us = 0").ok(),
        Some(PollMode::Adaptive { idle_after: DEFAULT_IDLE_AFTER, linger: Duration::ZERO })
    );
    for text in ["linger_us = -1", "linger_us = 1000001", "poll = \"always\"\nlinger_us = 5"] {
        assert!(polls(text).is_err(), "{text}");
    }
}

#[test]
fn how_long_commands_are_gathered_is_told_in_microseconds() {
    let gather = |text: &str| parse(&format!("{text}{MINIMAL}")).map(|config| config.gather);
    assert_eq!(gather("").ok(), Some(DEFAULT_GATHER));
    assert_eq!(gather("gather_us = 0").ok(), Some(Duration::ZERO));
    let changed = good(&format!("gather_us = 5{MINIMAL}"));
    assert_eq!(Config::changes(&good(MINIMAL), &changed).restart, [RestartReason::Gather]);
    for (text, reason) in [
        ("linger_us = 1", RestartReason::Linger),
        ("idle_after_us = 1", RestartReason::IdleAfter),
        ("poll = \"always\"", RestartReason::Poll),
    ] {
        let changed = good(&format!("{text}\n{MINIMAL}"));
        assert_eq!(Config::changes(&good(MINIMAL), &changed).restart, [reason], "{text}");
    }
    assert_eq!(gather("poll = \"always\"\ngather_us = 150").ok(), Some(Duration::from_micros(150)));
    for text in ["gather_us = -1", "gather_us = 151", "gather_us = \"5us\""] {
        assert!(gather(text).is_err(), "{text}");
    }
}

#[test]
fn all_problems_are_told_at_once_in_the_order_of_the_text() {
    let text = r#"
cores = [0, 9, 0]
buffer_memory = "5MiB"
idle_after_us = 5
poll = "always"
[[listener]]
address = "0.0.0.0:4420"
[[listener]]
address = "127.0.0.1:4420"
advertise = "0.0.0.0"
congestion_control = "two words"
[[subsystem]]
nqn = "nqn.2014-08.org.nvmexpress.discovery"
allow_any_host = true
[[subsystem]]
nqn = "nqn.2026-11.io.fastice:a"
hosts = []
[[subsystem]]
nqn = "nqn.2026-11.io.fastice:b"
[[subsystem.namespace]]
nsid = 0
null = "1MiB"
[[subsystem.namespace]]
nsid = 3
null = "1000"
[[subsystem.namespace]]
nsid = 3
memory = "1MiB"
prepare = true
[[subsystem.namespace]]
nsid = 3
memory = "1MiB"
[[subsystem.namespace]]
file = "relative"
"#;
    insta::assert_snapshot!(reasons(text).join("\n"), @r#"
    2: core 9 is not one that this process may use (0, 1, 4)
    2: core 0 is named twice
    3: buffer_memory is a multiple of 2MiB, the size of a hugepage
    4: idle_after_us has no effect with poll = "always": remove one of them
    9: 127.0.0.1:4420 collides with the listener on 0.0.0.0:4420
    10: `0.0.0.0` is no address that a host can connect to: write 192.0.2.1 or 2001:db8::1, without a port
    11: `two words` names no congestion control: write "cubic", or "bbr"
    13: the discovery subsystem is always there: it is not configured
    17: no host may connect: name some, or say allow_any_host = true
    18: no host may connect: list them, hosts = ["nqn…"], or say allow_any_host = true
    21: nsid 0 is not from 1 to 1024
    25: 1000 B is no multiple of the block size 4096
    29: device, prepare, update_mtime, on_fence, guard and local_readers have a meaning for a file only
    31: nsid 3 is used twice in nqn.2026-11.io.fastice:b
    34: file must be an absolute path
    "#);
}

#[test]
fn names_files_and_listeners_are_used_once() {
    let twice = format!(
        "{MINIMAL}{}",
        MINIMAL.split("[[subsystem]]").nth(1).map_or(String::new(), |rest| format!("[[subsystem]]{rest}"))
    );
    assert_eq!(
        reasons(&twice),
        [
            "10: another subsystem is called nqn.2026-11.io.fastice:vm1 already",
            "13: /srv/vm1.img is a namespace of nqn.2026-11.io.fastice:vm1 already"
        ]
    );
    let listener = "[[listener]]\naddress = \"127.0.0.1:4420\"\n";
    assert_eq!(
        reasons(&format!("{listener}{listener}")),
        ["4: 127.0.0.1:4420 collides with the listener on 127.0.0.1:4420"]
    );
    let ephemeral = "[[listener]]\naddress = \"127.0.0.1:0\"\n";
    assert_eq!(good(&format!("{ephemeral}{ephemeral}")).listeners.len(), 2);
}

#[test]
fn one_backing_exactly() {
    let reason = "a namespace has exactly one of file, memory and null";
    assert_eq!(reasons(&with("read_only = true")), [format!("7: {reason}")]);
    assert_eq!(reasons(&with("null = 4096\nmemory = 4096")), [format!("7: {reason}")]);
    assert_eq!(reasons(&with("null = 4096\nblock_size = 1024")), ["9: block_size is 512 or 4096, not 1024"]);
    assert_eq!(reasons(&with("null = -1")), ["8: a size is not negative"]);
}

#[test]
fn what_hosts_see_of_a_fence_is_chosen_by_namespace() {
    let policy = |text: &str| good(&with(text)).subsystems[0].namespaces.last().map(|it| it.on_fence);
    assert_eq!(policy("file = \"/srv/a.img\""), Some(FencePolicy::NotReady));
    for (word, expected) in [
        ("not-ready", FencePolicy::NotReady),
        ("ana", FencePolicy::Ana),
        ("write-protect", FencePolicy::WriteProtect),
    ] {
        assert_eq!(policy(&format!("file = \"/srv/a.img\"\non_fence = {word:?}")), Some(expected));
    }
    assert!(bad(&with("file = \"/srv/a.img\"\non_fence = \"read-only\"")).contains("unknown variant"));
    let twice = "file = \"/srv/a.img\"\nread_only = true\non_fence = \"write-protect\"";
    assert_eq!(reasons(&with(twice)), ["10: read_only is write protected already: leave on_fence out"]);
    let memory = "memory = 4096\non_fence = \"ana\"";
    let reason =
        "device, prepare, update_mtime, on_fence, guard and local_readers have a meaning for a file only";
    assert_eq!(reasons(&with(memory)), [format!("9: {reason}")]);
    assert!(
        !Config::changes(
            &good(&with("file = \"/srv/a.img\"")),
            &good(&with("file = \"/srv/a.img\"\non_fence = \"ana\""))
        )
        .is_empty()
    );
}

#[test]
fn hosts_are_never_opened_by_accident() {
    let listed =
        MINIMAL.replace("allow_any_host = true", "allow_any_host = true\nhosts = [\"nqn.2026-11.a:b\"]");
    assert_eq!(reasons(&listed), ["7: hosts has no effect with allow_any_host = true: remove one of them"]);
    let wrong = MINIMAL.replace("allow_any_host = true", "hosts = [\"vm1\"]");
    assert_eq!(reasons(&wrong), ["6: an NQN starts with `nqn.`, as in nqn.2026-11.com.example:vm1"]);
}

#[test]
fn a_target_that_nobody_could_reach_is_refused() {
    assert!(bad("").contains("no [[listener]]"));
    let only = MINIMAL.replace("[[subsystem]]", "discovery_only = true\n[[subsystem]]");
    assert!(bad(&only).contains("every listener is discovery_only"));
}

#[test]
fn odd_lines_are_shown_safely() {
    let long = format!("# {}\nstate_dir = \"\u{1b}\"\n", "x".repeat(5000));
    assert!(bad(&long).lines().all(|line| line.chars().count() < 400));
    let wide = format!("a = {{ {} = 1 }}", "k".repeat(3000));
    assert!(bad(&wide).lines().nth(1).is_some_and(|line| line.chars().count() < 120));
    assert!(!bad("x = '\u{1b}[31m'").contains('\u{1b}'));
}

#[test]
fn a_file_that_cannot_be_read_says_so() {
    let error = Config::load(Path::new("/nonexistent/fastice.toml")).expect_err("no such file");
    assert_eq!(error.to_string(), "/nonexistent/fastice.toml: cannot read the configuration file");
    assert!(std::error::Error::source(&error).is_some());
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.toml");
    std::fs::write(&path, b"log = \"info\"\nstate_dir = \"\xff\"").expect("a file");
    let error = Config::load(&path).expect_err("not UTF-8").to_string();
    assert!(error.contains(":2:14: the file is not UTF-8 here"), "{error}");
}

#[test]
fn a_reload_tells_live_changes_from_restarts() {
    let old = good(MINIMAL);
    assert!(Config::changes(&old, &good(MINIMAL)).is_empty());

    let new = good(&format!(
        "cores = 1\nlog = \"debug\"\n{}\n[[subsystem.namespace]]\nnull = \"1MiB\"\n[[subsystem]]\nnqn = \"nqn.2026-11.a:b\"\nallow_any_host = true\n",
        MINIMAL
            .replace("allow_any_host = true", "serial = \"x\"\nhosts = [\"nqn.2026-11.a:h\"]")
            .replace("vm1.img\"", "vm1.img\"\nread_only = true")
    ));
    let changes = Config::changes(&old, &new);
    let nqn = old.subsystems[0].nqn.clone();
    assert_eq!(changes.restart, [RestartReason::Cores, RestartReason::Identity(nqn.clone())]);
    let namespaces = &new.subsystems[0].namespaces;
    assert_eq!(
        changes.live,
        [
            LiveChange::LogLevel(LogLevel::Debug),
            LiveChange::NamespaceRemoved { nqn: nqn.clone(), nsid: 1 },
            LiveChange::HostsChanged { nqn: nqn.clone(), hosts: new.subsystems[0].hosts.clone() },
            LiveChange::NamespaceAdded { nqn: nqn.clone(), namespace: namespaces[0].clone() },
            LiveChange::NamespaceAdded { nqn: nqn.clone(), namespace: namespaces[1].clone() },
            LiveChange::SubsystemAdded(Box::new(new.subsystems[1].clone())),
        ]
    );
    let back = Config::changes(&new, &old);
    assert!(back.live.contains(&LiveChange::SubsystemRemoved(new.subsystems[1].nqn.clone())));
}

#[test]
fn the_corpus_neither_panics_nor_breaks_a_promise() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/config");
    let mut replayed = 0;
    for entry in std::fs::read_dir(&dir).expect("the corpus is there") {
        let path = entry.expect("an entry").path();
        fuzz_config(&std::fs::read(&path).expect("a corpus file"));
        replayed += 1;
    }
    assert!(replayed >= 10, "only {replayed} files in {}", dir.display());
}

proptest::proptest! {
    /// Cutting, doubling and overwriting pieces of a good file reaches most of the checks.
    #[test]
    fn damaged_files_neither_panic_nor_break_a_promise(cut in 0usize..400, len in 0usize..60, byte in 0u8..=255, again in 0usize..400) {
        let mut bytes = include_bytes!("../../deploy/fastice.toml.example").to_vec();
        let start = cut % bytes.len();
        let end = (start + len).min(bytes.len());
        bytes.drain(start..end);
        if let Some(at) = bytes.get_mut(again) {
            *at = byte;
        }
        fuzz_config(&bytes);
    }
}
