//! Goal: what an operator asks a controller for is answered, and events are told each time, not only once.

mod common;

use async_nvme::{Error, Event, IoError, OpKind, Options, State, block_on};
use common::{Rig, op};
use nvme_model::{CommandMatch, ControllerOptions, Fault, FaultAction, NamespaceOptions, Subsystem};
use nvme_spec::feature::{FeatureId, FeatureSelect, capability};
use nvme_spec::log::LogPageId;
use nvme_spec::{AdminOpcode, NvmOpcode, Status};

/// Runs a future of the controller, the model stepping.
macro_rules! ask {
    ($rig:ident, $method:ident ( $($argument:expr),* )) => {{
        let model = $rig.model.clone();
        block_on($rig.controller.$method($($argument),*), || _ = model.step())
    }};
}

fn count(field: [u8; 16]) -> u128 {
    u128::from_le_bytes(field)
}

#[test]
fn smart_tells_what_was_done() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(4);
    let media = FaultAction::Status(Status::UNRECOVERED_READ_ERROR.with_dnr());
    for token in 0..3 {
        let data = rig.filled(512, 1);
        assert_eq!(rig.run(&mut queue, op(token, OpKind::Write { fua: false }, token, 1, Some(data))), Ok(0));
    }
    rig.model.add_fault(Fault::once(CommandMatch::io(NvmOpcode::READ.0), media));
    for token in 0..2 {
        let _ = rig.run(&mut queue, op(token, OpKind::Read, 0, 1, rig.pool.alloc(512)));
    }
    let smart = ask!(rig, smart()).unwrap();
    assert_eq!((count(smart.host_write_commands), count(smart.host_read_commands)), (3, 1));
    assert_eq!((count(smart.data_units_written), count(smart.data_units_read)), (1, 1));
    assert_eq!((count(smart.media_errors), count(smart.error_log_entries)), (1, 1));
    assert_eq!(rig.controller.info().temperature_limits_k, (343, 353));
}

#[test]
fn the_error_log_tells_the_latest_first() {
    let mut rig = Rig::ready();
    assert_eq!(ask!(rig, error_log()).unwrap(), []);
    let mut queue = rig.queue(4);
    for token in 0..100u64 {
        let status = Status::new(2, u8::try_from(token).unwrap());
        let fault = FaultAction::Status(status);
        rig.model.add_fault(Fault::once(CommandMatch::any_io(), fault));
        let result = rig.run(&mut queue, op(token, OpKind::Verify, token, 1, None));
        assert_eq!(result, Err(IoError::Status(status)));
    }
    // More than one page of the driver's admin queue, in two reads.
    let log = ask!(rig, error_log()).unwrap();
    assert_eq!(log.len(), 64);
    let numbers: Vec<_> = log.iter().map(|entry| (entry.error_count.get(), entry.lba.get())).collect();
    assert_eq!(numbers, (0..64).map(|index| (100 - index, 99 - index)).collect::<Vec<_>>());
    assert_eq!((log[0].opcode, log[0].sqid.get(), log[0].nsid.get()), (NvmOpcode::VERIFY.0, 1, 1));
}

#[test]
fn log_pages_are_read_in_parts() {
    let mut rig = Rig::ready();
    let data = ask!(rig, log_page(LogPageId::CHANGED_NAMESPACES, u32::MAX, 4096)).unwrap();
    assert_eq!(data, [0; 4096]);
    for len in [0, 3, (1 << 20) + 4] {
        let wrong = ask!(rig, log_page(LogPageId::SMART_HEALTH, u32::MAX, len));
        assert!(matches!(wrong, Err(Error::TooLarge { .. })));
    }
    let unknown = ask!(rig, log_page(LogPageId(0xC0), u32::MAX, 512)).unwrap_err();
    assert!(matches!(unknown, Error::Status { status, .. } if status.code() == Status::INVALID_LOG_PAGE));
}

#[test]
fn the_write_cache_stays_off_over_a_reset() {
    let mut rig = Rig::ready();
    assert!(ask!(rig, write_cache()).unwrap());
    ask!(rig, set_write_cache(false)).unwrap();
    assert!(!ask!(rig, write_cache()).unwrap());
    rig.controller.reset();
    rig.until(State::Ready, 60_000);
    assert!(!ask!(rig, write_cache()).unwrap(), "the model forgets it, the driver does not");
    ask!(rig, set_write_cache(true)).unwrap();
    assert!(ask!(rig, write_cache()).unwrap());
    let options = ControllerOptions { volatile_write_cache: false, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 8), options);
    rig.start().unwrap();
    assert!(!ask!(rig, write_cache()).unwrap());
    ask!(rig, set_write_cache(false)).unwrap();
    assert!(matches!(ask!(rig, set_write_cache(true)), Err(Error::Unsupported { .. })));
}

#[test]
fn features_are_read_and_set() {
    let mut rig = Rig::ready();
    let arbitration = FeatureId::ARBITRATION;
    assert_eq!(ask!(rig, set_feature(arbitration, 0, 0x0302_0104, false)).unwrap(), 0);
    assert_eq!(ask!(rig, feature(arbitration, 0, FeatureSelect::CURRENT)).unwrap(), 0x0302_0104);
    let can = ask!(rig, feature(arbitration, 0, FeatureSelect::SUPPORTED_CAPABILITIES)).unwrap();
    assert_eq!(can, capability::CHANGEABLE);
    let saved = ask!(rig, set_feature(arbitration, 0, 1, true)).unwrap_err();
    assert!(matches!(saved, Error::Status { status, .. } if status.code() == Status::FEATURE_NOT_SAVEABLE));
}

#[test]
fn controllers_of_a_subsystem_are_listed() {
    let mut rig = Rig::ready();
    let _others: Vec<_> = (0..3).map(|_| rig.subsystem.controller(ControllerOptions::default())).collect();
    assert_eq!(ask!(rig, controllers(None)).unwrap(), [1, 2, 3, 4]);
    assert_eq!(ask!(rig, controllers(Some(1))).unwrap(), [1, 2, 3, 4]);
    assert!(ask!(rig, controllers(Some(9))).is_err());
}

fn events(rig: &mut Rig) -> Vec<u32> {
    let told = std::iter::from_fn(|| rig.controller.take_event());
    told.filter_map(|event| if let Event::Asynchronous(dw0) = event { Some(dw0) } else { None }).collect()
}

#[test]
fn each_event_is_told_not_only_the_first_of_its_type() {
    let mut rig = Rig::ready();
    for round in 0..20 {
        // A critical temperature; then the namespaces.
        rig.model.raise_event(0x0002_0101);
        rig.subsystem.add_namespace(NamespaceOptions::memory(2 + round, 9, 8)).unwrap();
        (0..60).for_each(|_| rig.turn());
        assert_eq!(events(&mut rig), [0x0002_0101, 0x0004_0002], "round {round}");
        assert_eq!(rig.controller.namespaces().len(), 2 + round as usize);
    }
}

#[test]
fn namespaces_that_change_during_a_rescan_are_seen_too() {
    let mut rig = Rig::ready();
    (0..20).for_each(|_| rig.turn());
    for nsid in 2..40 {
        rig.subsystem.add_namespace(NamespaceOptions::memory(nsid, 9, 8)).unwrap();
        rig.turn();
    }
    assert!(rig.subsystem.remove_namespace(17));
    (0..300).for_each(|_| rig.turn());
    let nsids: Vec<u32> = rig.controller.namespaces().iter().map(|namespace| namespace.nsid).collect();
    assert_eq!(nsids, (1..40).filter(|&nsid| nsid != 17).collect::<Vec<_>>());
}

#[test]
fn the_owner_cannot_take_the_admin_queue_from_the_driver() {
    let mut rig = Rig::ready();
    (0..20).for_each(|_| rig.turn());
    // As many commands as are taken, each of which takes its time.
    rig.model.add_fault(Fault::always(
        CommandMatch::admin(AdminOpcode::KEEP_ALIVE.0),
        FaultAction::Delay { steps: 100 },
    ));
    let keep_alive =
        async_nvme::AdminCommand { opcode: AdminOpcode::KEEP_ALIVE.0, ..async_nvme::AdminCommand::default() };
    let tokens: Vec<_> = std::iter::from_fn(|| rig.controller.submit_admin(&keep_alive).ok()).collect();
    assert!(tokens.len() > 15);
    rig.subsystem.add_namespace(NamespaceOptions::memory(2, 9, 8)).unwrap();
    (0..50).for_each(|_| rig.turn());
    assert_eq!(rig.controller.namespaces().len(), 2);
    (0..100).for_each(|_| rig.turn());
    assert!(tokens.into_iter().all(|token| rig.controller.take_admin(token).is_some()));
    rig.subsystem.add_namespace(NamespaceOptions::memory(3, 9, 8)).unwrap();
    (0..100).for_each(|_| rig.turn());
    assert_eq!(rig.controller.namespaces().len(), 3);
}

#[test]
fn nonsense_in_identify_data_is_survived() {
    let matches = CommandMatch::admin(AdminOpcode::IDENTIFY.0);
    for skip in 0..6 {
        for steps in 0..20 {
            let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 64), ControllerOptions::default());
            // The noise depends on the step.
            (0..steps).for_each(|_| _ = rig.model.step());
            rig.model.add_fault(Fault { skip, ..Fault::once(matches, FaultAction::Garbage) });
            match rig.start() {
                // Whatever it says now: it can be listed, and refused or opened.
                Ok(()) => {
                    let nsids: Vec<u32> = rig.controller.namespaces().iter().map(|ns| ns.nsid).collect();
                    for nsid in nsids {
                        let ticket = rig.controller.queue_ticket(nsid, 4);
                        drop(ticket.map(|ticket| ticket.open(&rig.pool)));
                    }
                    (0..20).for_each(|_| rig.turn());
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
}

#[test]
fn a_hook_decides_command_by_command() {
    let subsystem = Subsystem::new("HOOK");
    subsystem.add_namespace(NamespaceOptions::memory(1, 9, 64)).unwrap();
    let mut rig = Rig::over(&subsystem, ControllerOptions::default(), Options::default());
    rig.start().unwrap();
    let mut queue = rig.queue(4);
    let status = Status::WRITE_FAULT.with_dnr();
    rig.model.set_fault_hook(Some(Box::new(move |qid, sqe| {
        (qid.0 != 0 && sqe.cdw10_11() % 2 == 1).then_some(FaultAction::Status(status))
    })));
    for lba in 0..8 {
        let result = rig.run(&mut queue, op(1, OpKind::Verify, lba, 1, None));
        assert_eq!(result, if lba % 2 == 1 { Err(IoError::Status(status)) } else { Ok(0) });
    }
    rig.model.set_fault_hook(None);
    assert_eq!(rig.run(&mut queue, op(1, OpKind::Verify, 1, 1, None)), Ok(0));
}
