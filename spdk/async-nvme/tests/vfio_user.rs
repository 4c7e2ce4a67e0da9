//! Goal: no server can panic the client, hold it past its deadline, or have it believe nonsense. Method: servers played
//! by hand, right but for one answer; for servers that are right see the tests of `nvme-model`.

mod scripted;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_nvme::vfio_user::Stream;
use async_nvme::vfio_user::wire::{Command, DmaMap, Header, IrqSet, SparseArea, irq_set_flag};
use async_nvme::{Access, AccessError, VfioUserAccess, VfioUserOptions};
use hugepage_alloc::{DmaRegion, RegionOptions};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use scripted::{BAR_LEN, DEADLINE, FAULTS, Fault, Script};
use zerocopy::{FromBytes, IntoBytes};

/// What a fault in an answer may come to: an error, or a value that is as good as another.
fn connects_all_the_same(command: Command, fault: Fault) -> bool {
    let has_data = ![Command::DMA_MAP, Command::DEVICE_SET_IRQS, Command::DEVICE_RESET].contains(&command);
    match fault {
        // Files that were not asked for are closed, and that is all.
        Fault::TooManyFiles => true,
        // Counts and bits of another value.
        Fault::GarbageData => command == Command::DEVICE_GET_IRQ_INFO || !has_data,
        _ => false,
    }
}

#[test]
fn a_server_that_is_wrong_in_one_answer_is_not_connected_to() {
    let commands = [
        Command::VERSION,
        Command::DEVICE_GET_INFO,
        Command::DEVICE_GET_REGION_INFO,
        Command::DEVICE_GET_IRQ_INFO,
        Command::REGION_READ,
        Command::REGION_WRITE,
    ];
    for command in commands {
        each_fault(|fault| {
            let began = Instant::now();
            let (access, server) = Script::fault(command, 0, fault).connect();
            assert!(began.elapsed() < DEADLINE * 3, "{command:?} {fault:?}: {:?}", began.elapsed());
            assert_eq!(
                access.is_ok(),
                connects_all_the_same(command, fault),
                "{command:?} {fault:?}: {access:?}"
            );
            drop(access);
            server.join().unwrap();
        });
    }
}

/// All faults at the same time, for most are waited out.
fn each_fault(case: impl Fn(Fault) + Sync) {
    std::thread::scope(|scope| {
        let case = &case;
        let cases = FAULTS.map(|fault| scope.spawn(move || case(fault)));
        cases.into_iter().for_each(|case| case.join().unwrap());
    });
}

#[test]
fn devices_that_are_no_nvme_controller_are_refused() {
    let refused = |script: Script, what: &str| {
        let (access, server) = script.connect();
        let error = access.unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains(what), "{text}");
        server.join().unwrap();
    };
    refused(Script { device_flags: 1, ..Script::good() }, "no PCI function");
    refused(Script { bar_len: 4096, ..Script::good() }, "not that of an NVMe controller");
    refused(Script { bar_len: u64::MAX, ..Script::good() }, "not that of an NVMe controller");
}

/// Whether a fault in the answer to a later command ends the connection, or is but a refusal.
fn ends_the_connection(command: Command, fault: Fault) -> bool {
    let has_data = [Command::REGION_READ, Command::REGION_WRITE, Command::DMA_UNMAP].contains(&command);
    match fault {
        Fault::Refusal | Fault::RefusalWithoutReason | Fault::TooManyFiles => false,
        Fault::NoData | Fault::GarbageData => has_data,
        _ => true,
    }
}

#[test]
fn a_wrong_answer_later_makes_the_device_gone() {
    let region =
        DmaRegion::with_options(1, &RegionOptions { share: true, ..RegionOptions::ordinary() }).unwrap();
    // One read and one write are made on connecting.
    let cases = [
        (Command::REGION_READ, 1),
        (Command::REGION_WRITE, 1),
        (Command::DMA_MAP, 0),
        (Command::DMA_UNMAP, 0),
        (Command::DEVICE_RESET, 0),
        (Command::DEVICE_SET_IRQS, 0),
    ];
    for (command, skip) in cases {
        each_fault(|fault| {
            let script = Script { vectors: 2, ..Script::fault(command, skip, fault) };
            let (access, server) = script.connect();
            let access = access.unwrap();
            let began = Instant::now();
            let failed = provoke(&access, command, &region);
            let what = format!("{command:?} {fault:?}");
            assert!(began.elapsed() < DEADLINE * 3, "{what}: {:?}", began.elapsed());
            let gone = ends_the_connection(command, fault);
            let refused = command != Command::REGION_WRITE
                && matches!(fault, Fault::Refusal | Fault::RefusalWithoutReason);
            assert_eq!(failed, gone || refused, "{what}");
            if gone {
                assert_eq!((access.read32(0), access.read64(8)), (u32::MAX, u64::MAX), "{what}");
                assert!(matches!(access.config_read32(0), Err(AccessError::Gone { .. })), "{what}");
                assert!(matches!(access.dma_map(&region), Err(AccessError::Gone { .. })), "{what}");
            } else {
                assert_eq!(access.read32(0), 0x4242_4242, "{what}: the connection still stands");
            }
            drop(access);
            server.join().unwrap();
        });
    }
}

/// Has the command sent; whether it failed.
fn provoke(access: &VfioUserAccess, command: Command, region: &DmaRegion) -> bool {
    match command {
        Command::REGION_READ => access.config_read32(0).is_err(),
        Command::REGION_WRITE => {
            // A write cannot fail; that the device is gone shows in what comes next.
            access.write32(0x14, 1);
            access.config_read32(0).is_err()
        }
        Command::DMA_MAP => access.dma_map(region).is_err(),
        Command::DMA_UNMAP => access.dma_map(region).and_then(|mapping| access.dma_unmap(&mapping)).is_err(),
        Command::DEVICE_RESET => access.function_reset().is_err(),
        _ => access.interrupt_attach(0, File::open("/dev/null").unwrap().as_fd()).is_err(),
    }
}

#[test]
fn commands_of_a_server_are_refused_and_do_no_harm() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = Script { seen: seen.clone(), ..Script::good() };
    let second = theirs.try_clone().unwrap();
    let server = std::thread::spawn(move || script.serve(theirs));
    let access = VfioUserAccess::over(ours, "scripted", &VfioUserOptions::default()).unwrap();
    let mut socket = &second;
    let wants = Header { message_len: 32, ..Header::command(5, Command::DMA_WRITE, 0) };
    socket.write_all(&[wants.as_bytes(), &[0; 16]].concat()).unwrap();
    assert_eq!(access.read32(0), 0x4242_4242);
    drop(access);
    server.join().unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.iter().any(|(command, body, _)| *command == Command::DMA_WRITE && body.is_empty()));
}

fn memfd(seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(c"bar", flags).unwrap();
    rustix::fs::ftruncate(&file, BAR_LEN).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn doorbells_are_mapped_only_from_files_that_cannot_shrink_and_ranges_that_fit() {
    let area = |offset, len| SparseArea { offset, len };
    let doorbells = area(4096, 4096);
    let cases = [
        (vec![doorbells], SealFlags::SHRINK, true),
        (vec![area(8192, 4096), doorbells], SealFlags::SHRINK, true),
        (vec![doorbells], SealFlags::GROW, false),
        (vec![area(4096, 8192)], SealFlags::SHRINK, false),
        (vec![area(4096, u64::MAX)], SealFlags::SHRINK, false),
        (vec![area(u64::MAX - 4095, 4096)], SealFlags::SHRINK, false),
        (vec![area(4097, 64)], SealFlags::SHRINK, false),
        (vec![area(4096, 100)], SealFlags::SHRINK, false),
        (vec![], SealFlags::SHRINK, false),
    ];
    for (areas, seals, mapped) in cases {
        let file = memfd(seals);
        let memory = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let what = format!("{areas:?} {seals:?}");
        let script = Script { mappable: Some((areas, file)), seen: seen.clone(), ..Script::good() };
        let (access, server) = script.connect();
        let access = access.unwrap();
        assert_eq!(access.has_mapped_doorbells(), mapped, "{what}");
        access.write32(0x1004, 0x1234_5678);
        assert_eq!(access.read32(0), 0x4242_4242, "registers are read by messages");
        let mut word = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&memory, &mut word, 0x1004).unwrap();
        let posted = seen.lock().unwrap().iter().filter(|(c, ..)| *c == Command::REGION_WRITE).count() - 1;
        let expected = if mapped { (0x1234_5678, 0) } else { (0, 1) };
        assert_eq!((u32::from_le_bytes(word), posted), expected, "{what}");
        drop(access);
        server.join().unwrap();
    }
}

#[test]
fn interrupts_go_through_eventfds_and_can_be_masked() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (access, server) = Script { vectors: 3, seen: seen.clone(), ..Script::good() }.connect();
    let access = access.unwrap();
    assert_eq!(access.interrupts_max(), 3);
    let eventfd = File::open("/dev/null").unwrap();
    assert!(matches!(access.interrupt_attach(3, eventfd.as_fd()), Err(AccessError::NoSuch { .. })));
    access.interrupt_attach(2, eventfd.as_fd()).unwrap();
    access.interrupt_detach(2).unwrap();
    access.interrupt_attach(2, eventfd.as_fd()).unwrap();
    drop(access);
    server.join().unwrap();
    let sets: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .filter(|(command, ..)| *command == Command::DEVICE_SET_IRQS)
        .map(|(_, body, fds)| (IrqSet::read_from_bytes(body).unwrap(), *fds))
        .collect();
    let attach = irq_set_flag::DATA_EVENTFD | irq_set_flag::ACTION_TRIGGER;
    let mask = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_MASK;
    let unmask = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_UNMASK;
    let flags: Vec<_> = sets.iter().map(|(set, fds)| (set.flags, *fds)).collect();
    assert_eq!(flags, [(attach, 1), (mask, 0), (attach, 1), (unmask, 0)]);
    assert!(sets.iter().all(|(set, _)| (set.index, set.start, set.count) == (2, 2, 1)));
}

#[test]
fn mappings_are_told_revoked_and_restored_at_the_same_addresses() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let script = Script { max_dma_maps: 2, seen: seen.clone(), ..Script::good() };
    let (access, server) = script.connect();
    let access = access.unwrap();
    let options = RegionOptions { share: true, ..RegionOptions::ordinary() };
    let regions = [(); 3].map(|()| DmaRegion::with_options(4 << 20, &options).unwrap());
    let first = access.dma_map(&regions[0]).unwrap();
    access.dma_revoke().unwrap();
    let second = access.dma_map(&regions[1]).unwrap();
    assert!(matches!(access.dma_map(&regions[2]), Err(AccessError::NoSuch { .. })), "the server's limit");
    access.dma_revoke().unwrap();
    access.dma_restore().unwrap();
    access.dma_restore().unwrap();
    access.dma_unmap(&first).unwrap();
    access.dma_unmap(&second).unwrap();
    drop(access);
    server.join().unwrap();
    let (one, two) = (first.iova(0).unwrap().0, second.iova(0).unwrap().0);
    let told: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .filter_map(|(command, body, fds)| match *command {
            Command::DMA_MAP => {
                let map = DmaMap::read_from_bytes(body).unwrap();
                assert_eq!((map.flags, map.offset, map.len, *fds), (3, 0, 4 << 20, 1));
                Some(('m', map.address))
            }
            Command::DMA_UNMAP => Some(('u', u64::from_ne_bytes(body[8..16].try_into().unwrap()))),
            _ => None,
        })
        .collect();
    assert_eq!(told, [('m', one), ('u', one), ('m', one), ('m', two), ('u', one), ('u', two)]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_of_a_server_do_more_than_end_the_connection(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        at in 0usize..6,
        framed in any::<bool>(),
    ) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let script = Script::good();
            let mut socket = theirs.try_clone().unwrap();
            let mut stream = Stream::new(theirs).unwrap();
            let end = Instant::now() + Duration::from_secs(20);
            for number in 0.. {
                let Ok(message) = stream.receive(end) else { return };
                let header = message.header.reply();
                let sent = match (number == at, framed) {
                    (true, true) => stream.send(header, &[&bytes], &[], end).is_ok(),
                    (true, false) => socket.write_all(&bytes).is_ok(),
                    (false, _) => stream.send(header, &[&script.answer(&message)], &[], end).is_ok(),
                };
                if !sent {
                    return;
                }
            }
        });
        let options = VfioUserOptions { message_deadline: Duration::from_millis(50) };
        let began = Instant::now();
        if let Ok(access) = VfioUserAccess::over(ours, "scripted", &options) {
            let _ = access.read32(0);
            let _ = access.dma_revoke();
        }
        prop_assert!(began.elapsed() < Duration::from_secs(2));
        server.join().unwrap();
    }
}
