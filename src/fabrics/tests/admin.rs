//! Admin commands: Identify, logs, features, and what is refused.

use super::super::*;
use super::harness::*;
use nvme_spec::Status;

#[test]
fn identify_knows_its_questions_and_refuses_others() {
    let target = target();
    let (mut admin, _) = ready(&target);
    let field = (Status::INVALID_FIELD, true);
    let namespace = (Status::INVALID_NAMESPACE, true);
    for cns in [4, 9, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0xFF] {
        assert_eq!(admin.status(identify(cns, 1)), field, "{cns:#x}");
    }
    for cns in [0, 3, 5, 8] {
        for nsid in [0, 1025, u32::MAX] {
            assert_eq!(admin.status(identify(cns, nsid)), namespace, "{cns} {nsid}");
        }
    }
    for cns in [0, 5, 8] {
        assert_eq!(admin.data(identify(cns, 2)), vec![0; 4096], "valid but not active");
    }
    assert_eq!(admin.status(identify(3, 2)), namespace);
    for cns in [5, 6, 7] {
        assert_eq!(admin.status(command(6, 1, 4096, [cns, 1 << 24, 0])), field, "another command set");
    }
    assert_eq!(admin.status(identify(2, 0xFFFF_FFFE)), namespace);
    assert_eq!(admin.data(identify(2, 1))[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(admin.data(identify(7, 3)), vec![0; 4096]);
    assert_eq!(admin.data(identify(0x1C, 0))[..9], [1, 0, 0, 0, 0, 0, 0, 0, 0]);
    for len in [0, 4095, 8192] {
        let sqe = command(6, 0, len, [1, 0, 0]);
        assert_eq!(admin.status(sqe), (Status::DATA_SGL_LENGTH_INVALID, true));
    }
}

#[test]
fn identify_tells_hosts_what_they_insist_on() {
    let target = target();
    let (mut admin, _) = ready(&target);
    let data = admin.data(identify(1, 0));
    let word = |at: usize| u16::from_le_bytes([data[at], data[at + 1]]);
    let dword = |at: usize| u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
    assert_eq!(data[76] & 0b1010, 0b0010, "CMIC: many controllers, no ANA");
    assert_eq!(data[77], 8, "MDTS");
    assert_eq!(dword(80), 0x0002_0000, "VER");
    assert_eq!(dword(92), 1 << 8, "OAES");
    assert_eq!(dword(96), 1 | 1 << 6, "CTRATT");
    assert_eq!(data[111], 1, "CNTRLTYPE");
    assert_eq!(word(256), 0, "OACS");
    assert_ne!(word(320), 0, "KAS");
    assert_eq!((data[512], data[513]), (0x66, 0x44), "SQES, CQES");
    assert!(word(514) >= 128, "MAXCMD");
    assert_eq!(dword(516), 1024, "NN");
    assert_eq!(word(520), 1 << 2 | 1 << 3 | 1 << 4, "ONCS");
    assert_eq!(data[525], 0b101, "VWC");
    assert_eq!(dword(536), 1 | 1 << 20 | 1 << 21, "SGLS");
    assert_eq!(&data[768..768 + NQN.len() + 1], format!("{NQN}\0").as_bytes());
    assert_eq!(dword(1792), (64 + 16384) / 16, "IOCCSZ");
    assert_eq!(dword(1796), 1, "IORCSZ");
    assert_eq!(word(1800), 0, "ICDOFF");
    let namespace = admin.data(identify(0, 3));
    assert_eq!(namespace[..8], (LEN / 512).to_le_bytes());
    assert_eq!(namespace[30], 1, "NMIC");
    assert_eq!(namespace[99], 1, "NSATTR: write protected");
    assert_eq!(namespace[130], 9, "LBADS");
    let export = &target.exports()[1];
    assert_eq!(namespace[104..120], export.nguid);
    assert_eq!(namespace[120..128], export.eui64);
    let descriptors = admin.data(identify(3, 3));
    let expected =
        [&[1, 8, 0, 0][..], &export.eui64, &[2, 16, 0, 0], &export.nguid, &[4, 1, 0, 0, 0], &[0; 4]].concat();
    assert_eq!(descriptors[..expected.len()], expected);
    assert_eq!(admin.data(identify(8, 3))[..10], [1 << 5, 1, 0, 0, 0, 0, 0, 0, 1, 0], "no cache behind it");
}

#[test]
fn log_pages_are_read_in_parts_and_never_beyond() {
    let target = target();
    let (mut admin, _) = ready(&target);
    assert_eq!(&admin.data(log(3, 512, 0, false))[..1], [1], "AFI");
    let supported = admin.data(log(0, 1024, 0, false));
    let listed: Vec<_> = (0..256).filter(|id| supported[id * 4] & 1 != 0).collect();
    assert_eq!(listed, [0, 1, 2, 3, 4, 5, 0x12, 0x13]);
    for id in 0..=255u32 {
        if !listed.contains(&(id as usize)) {
            assert_eq!(admin.status(log(id, 512, 0, true)), (Status::INVALID_LOG_PAGE, true), "{id:#x}");
        } else {
            admin.data(log(id, 512, 0, true));
        }
    }
    let effects = admin.data(log(5, 4096, 0, false));
    let commands: Vec<_> = (0..512).filter(|id| effects[id * 4] & 1 != 0).collect();
    assert_eq!(commands, [2, 6, 8, 9, 10, 12, 24, 256, 257, 258, 264, 265]);
    assert_eq!(admin.data(log(5, 1024, 1024, false)), effects[1024..2048]);
    assert_eq!(admin.data(log(3, 1024, 0, false))[512..], [0; 512], "zeroes behind the end");
    let features = admin.data(log(0x12, 1024, 0, false));
    let listed: Vec<_> = (0..256).filter(|id| features[id * 4] & 1 != 0).collect();
    assert_eq!(listed, [0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x0A, 0x0B, 0x0F, 0x16, 0x81]);

    let field = (Status::INVALID_FIELD, true);
    assert_eq!(admin.status(log(3, 4, 2, false)), field, "offset of half a dword");
    assert_eq!(admin.status(log(3, 4, 516, false)), field, "offset behind the end");
    assert_eq!(admin.status(log(3, (1 << 20) + 4, 0, false)), field, "MDTS");
    let mut index = log(3, 4, 0, false);
    index.cdw14.set(1 << 23);
    assert_eq!(admin.status(index), field);
    let mut specific = log(3, 4, 0, false);
    specific.cdw10.set(specific.cdw10.get() | 1 << 8);
    assert_eq!(admin.status(specific), field);
    let mut short = log(3, 512, 0, false);
    short.dptr.length.set(508);
    assert_eq!(admin.status(short), (Status::DATA_SGL_LENGTH_INVALID, true));
    let mut of_namespace = log(2, 512, 0, false);
    of_namespace.nsid.set(1);
    assert_eq!(admin.status(of_namespace), field);
    let mut all = log(3, 4, 0, false);
    (all.cdw10, all.cdw11) = (0xFFFF_0003.into(), 0xFFFF.into());
    assert_eq!(admin.status(all), field, "16 GiB");
}

#[test]
fn features_are_got_and_set() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let get = |id: u32, select: u32| command(0x0A, 0, 0, [id | select << 8, 0, 0]);
    let set = |id: u32, value: u32| command(0x09, 0, 0, [id, value, 0]);
    let mut value = |sqe| admin.respond(sqe);
    assert_eq!(value(get(7, 0)), Completion::with_dw0(0x003F_003F));
    assert_eq!(value(set(7, 0x0001_0003)), Completion::with_dw0(0x0001_0001));
    assert_eq!(value(get(7, 0)), Completion::with_dw0(0x0001_0001));
    assert_eq!(value(get(7, 1)), Completion::with_dw0(0x003F_003F), "default");
    assert_eq!(value(get(7, 3)), Completion::with_dw0(0b100), "changeable");
    assert_eq!(value(set(0x0F, 1500)), Completion::SUCCESS);
    assert_eq!(value(get(0x0F, 0)), Completion::with_dw0(2000), "rounded up to KAS");
    assert_eq!(value(set(0x0B, 0x1FF)), Completion::SUCCESS);
    assert_eq!(value(get(0x0B, 0)), Completion::with_dw0(0x1FF));
    assert_eq!(value(get(0x0B, 2)), Completion::with_dw0(0));
    assert_eq!(value(get(6, 0)), Completion::with_dw0(1));
    assert_eq!(value(set(6, 1)), Completion::SUCCESS);
    assert_eq!(value(get(2, 0)), Completion::with_dw0(0));
    assert_eq!(value(set(2, 0)), Completion::SUCCESS);

    let field = (Status::INVALID_FIELD, true);
    for (sqe, expected) in [
        (set(6, 0), (Status::FEATURE_NOT_CHANGEABLE, true)),
        (set(7, 0xFFFF), field),
        (set(7, 0xFFFF_0000), field),
        (set(2, 1), field),
        (set(0x0B, 1 << 11), field),
        (set(0x0B, 1 << 31), field),
        (set(0x8000_0000 | 0x0B, 0), (Status::FEATURE_NOT_SAVEABLE, true)),
        (set(0x81, 0), (Status::COMMAND_SEQUENCE_ERROR, true)),
        (command(0x09, 1, 0, [0x0B, 0, 0]), (Status::FEATURE_NOT_NAMESPACE_SPECIFIC, true)),
        (get(7, 4), field),
        (get(0x81, 0), field),
    ] {
        assert_eq!(admin.status(sqe), expected, "{sqe:?}");
    }
    for id in (0..=255).filter(|id| ![1, 2, 4, 5, 6, 7, 0xA, 0xB, 0xF, 0x16, 0x81].contains(id)) {
        assert_eq!(admin.status(get(id, 0)), field, "{id:#x}");
        assert_eq!(admin.status(set(id, 0)), field, "{id:#x}");
    }
    assert_eq!(admin.data(command(0x0A, 0, 16, [0x81, 1, 0])), [5; 16], "host identifier");
    let _io = io_queue(&target, cntlid, 1);
    assert_eq!(admin.status(set(7, 0)), (Status::COMMAND_SEQUENCE_ERROR, true), "too late");
}

#[test]
fn host_behavior_is_kept_until_reset() {
    let target = target();
    let (mut admin, _) = ready(&target);
    let get = command(0x0A, 0, 512, [0x16, 0, 0]);
    let set = command(0x09, 0, 512, [0x16, 0, 0]);
    let mut data = vec![0; 512];
    data[0] = 1;
    assert_eq!(admin.send(set, &data), Begin::Respond(Completion::SUCCESS));
    assert_eq!(admin.data(get), data);
    data[2] = 1;
    assert!(
        matches!(admin.send(set, &data), Begin::Respond(it) if it.status.code() == Status::INVALID_FIELD)
    );
    assert_eq!(admin.status(command(0x09, 0, 511, [0x16, 0, 0])), (Status::DATA_SGL_LENGTH_INVALID, true));
    admin.set_cc(ENABLE & !1);
    admin.set_cc(ENABLE);
    assert_eq!(admin.data(get), vec![0; 512]);
}

#[test]
fn what_is_not_supported_says_so() {
    let target = target();
    let (mut admin, _) = ready(&target);
    for opcode in [0x00, 0x01, 0x04, 0x05, 0x0D, 0x10, 0x11, 0x14, 0x15, 0x19, 0x1A, 0x7C, 0x80, 0x81, 0xC0] {
        let sqe = command(opcode, 0, 0, [0; 3]);
        assert_eq!(admin.status(sqe), (Status::INVALID_OPCODE, true), "{opcode:#x}");
    }
    assert_eq!(admin.status(command(0x7F, 8, 0, [0; 3])), (Status::DISCONNECT_INVALID_QUEUE_TYPE, true));
    assert_eq!(admin.status(Connect::admin().command()), (Status::COMMAND_SEQUENCE_ERROR, true));
    for fctype in [0x05, 0x06, 0x99] {
        let sqe = command(0x7F, fctype, 0, [0; 3]);
        assert_eq!(admin.status(sqe), (Status::INVALID_FIELD, true), "authentication");
    }
    let error = admin.set_cc(1);
    assert_eq!(error.status.code(), Status::INVALID_FIELD, "entry sizes of zero");
}

#[test]
fn data_that_nobody_asked_for_is_refused() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    for queue in [&mut admin, &mut io] {
        let begin = queue.session.finish(&self::io(1, 1, 0, 1), &[0; 512], queue.now);
        assert!(matches!(begin, Begin::Respond(it) if it.status.code() == Status::COMMAND_SEQUENCE_ERROR));
    }
    let set = command(0x09, 0, 512, [0x16, 0, 0]);
    let begin = admin.session.finish(&set, &[0; 511], admin.now);
    assert!(matches!(begin, Begin::Respond(it) if it.status.code() == Status::DATA_SGL_LENGTH_INVALID));
}

#[test]
fn mandatory_features_keep_what_the_host_sets_until_reset() {
    let target = target();
    let (mut admin, _) = ready(&target);
    let get = |id: u32, nsid: u32, value: u32| command(0x0A, nsid, 0, [id, value, 0]);
    let set = |id: u32, nsid: u32, value: u32| command(0x09, nsid, 0, [id, value, 0]);
    let (over, under) = (0, 1 << 20);
    let defaults =
        [(1, 0, 0, 7), (4, 0, over, 0xFFFF), (4, 0, under, 0), (5, 1, 0, 0), (5, 3, 0, 0), (10, 0, 0, 0)];
    for (id, nsid, select, value) in defaults {
        assert_eq!(admin.respond(get(id, nsid, select)), Completion::with_dw0(value), "{id}");
    }
    let changes = [
        (1, 0, 0x0302_01FA, 0, 0x0302_0102),
        (4, 0, over | 350, over, 350),
        (4, 0, under | 280, under, 280),
        (5, 3, 25, 0, 25),
        (10, 0, 0xFFFF_FFFF, 0, 1),
    ];
    for (id, nsid, value, select, expected) in changes {
        assert_eq!(admin.respond(set(id, nsid, value)), Completion::SUCCESS, "{id}");
        assert_eq!(admin.respond(get(id, nsid, select)), Completion::with_dw0(expected), "{id}");
    }
    assert_eq!(admin.respond(get(5, 1, 0)), Completion::with_dw0(0), "of another namespace");
    assert_eq!(admin.respond(set(5, u32::MAX, 7)), Completion::SUCCESS);
    assert_eq!(admin.respond(get(5, 1, 0)), Completion::with_dw0(7), "of all");
    assert_eq!(admin.respond(set(4, 0, 0xF << 16 | 300)), Completion::SUCCESS, "all sensors: none");
    assert_eq!(admin.respond(get(4, 0, over)), Completion::with_dw0(350));
    assert_eq!(admin.respond(command(0x0A, 0, 0, [5 | 3 << 8, 0, 0])), Completion::with_dw0(0b110));

    let (field, invalid) = ((Status::INVALID_FIELD, true), (Status::INVALID_NAMESPACE, true));
    for (sqe, expected) in [
        (set(4, 0, 1 << 16), field),
        (set(4, 0, 2 << 20), field),
        (get(4, 0, 0xF << 16), field),
        (set(5, 1, 1 << 16), field),
        (set(5, 2, 0), field),
        (set(5, 0, 0), invalid),
        (get(5, u32::MAX, 0), invalid),
        (get(5, 2, 0), field),
        (set(1, 1, 0), (Status::FEATURE_NOT_NAMESPACE_SPECIFIC, true)),
    ] {
        assert_eq!(admin.status(sqe), expected, "{sqe:?}");
    }
    admin.set_cc(0x0046_0000);
    admin.set_cc(0x0046_0001);
    for (id, nsid, select, value) in defaults {
        assert_eq!(admin.respond(get(id, nsid, select)), Completion::with_dw0(value), "{id} after reset");
    }
}
