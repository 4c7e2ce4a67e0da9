//! Registers, reset, configuration space, interrupts, and a function that goes away.

use std::os::fd::AsFd as _;

use rustix::event::EventfdFlags;

use super::*;

// ---- registers, reset, configuration space ----------------------------------------------------------------

#[test]
fn registers_are_reached_by_the_window_and_by_the_file_beside_it() {
    let (tree, kernel) = host(Way::Group);
    kernel.state().host.areas = vec![Area { offset: 0, len: 0x2000 }, Area { offset: 0x3000, len: 0x1000 }];
    let function = open_by(Way::Group, &tree, &kernel).unwrap();
    let before = kernel.state().calls.len();
    for offset in [0x28, 0x1FF8, 0x3000] {
        function.write64(offset, 0x1122_3344_5566_7788);
        assert_eq!(function.read64(offset), 0x1122_3344_5566_7788);
        assert_eq!(function.read32(offset + 4), 0x1122_3344);
    }
    assert_eq!(kernel.state().calls.len(), before, "no call for what is mapped");
    function.write64(0x2FF8, 0x99AA_BBCC_DDEE_FF00);
    assert_eq!(function.read64(0x2FF8), 0x99AA_BBCC_DDEE_FF00);
    assert!(kernel.state().calls[before..].contains(&"write"));
    function.write64(0x1FFC, 5 << 32 | 6);
    assert_eq!((function.read32(0x1FFC), function.read32(0x2000)), (6, 5), "half in, half out");
    assert_eq!(function.bar_len(), BAR_LEN);
    for offset in [0x4000, 0x3FFE, 2, u32::MAX] {
        function.write32(offset, 1);
        assert_eq!(function.read32(offset), u32::MAX, "{offset:#x}");
    }
}

#[test]
fn a_reset_disables_the_controller_and_keeps_what_is_mapped() {
    let (function, kernel) = opened(Way::Group);
    let mapping = function.dma_map(&region(2)).unwrap();
    function.write32(CC, 1);
    function.function_reset().unwrap();
    assert_eq!(function.read32(CC), 0);
    assert!(reaches(&kernel, &mapping));
    kernel.state().failing.insert("DEVICE_RESET", libc::EAGAIN);
    assert!(matches!(function.function_reset(), Err(AccessError::Io { .. })));
    let (tree, kernel) = host(Way::Group);
    kernel.state().host.can_reset = false;
    let function = open_by(Way::Group, &tree, &kernel).unwrap();
    assert!(matches!(function.function_reset(), Err(AccessError::Unsupported { .. })));
}

#[test]
fn configuration_space_is_read_where_it_is() {
    let (function, _kernel) = opened(Way::Group);
    assert_eq!(function.config_read32(0).unwrap(), 0x0010_1B36);
    assert_eq!(function.config_read32(4092).unwrap(), 0);
    for offset in [4096, 2, u16::MAX] {
        assert!(matches!(function.config_read32(offset), Err(AccessError::NoSuch { .. })));
    }
}

#[test]
fn a_device_that_was_taken_out_reads_as_ones() {
    let (function, kernel) = opened(Way::Group);
    kernel.state().device.gone = true;
    assert_eq!((function.read32(CSTS), function.read64(0)), (u32::MAX, u64::MAX));
    assert!(function.is_gone());
    assert_eq!(function.config_read32(0).unwrap(), u32::MAX);
    assert!(matches!(function.function_reset(), Err(AccessError::Gone { .. })));
}

#[test]
fn a_function_that_the_host_wants_back_reads_as_gone_and_is_let_go() {
    let (function, kernel) = opened(Way::Group);
    let mapping = function.dma_map(&region(2)).unwrap();
    assert!(!function.is_gone());
    let release = kernel.state().device.eventfds.remove(&(4, 0)).unwrap();
    rustix::io::write(&release, &1u64.to_ne_bytes()).unwrap();
    kernel.state().device.registers.insert(CSTS, 1);
    assert_eq!(function.read32(CSTS), u32::MAX);
    function.write32(CC, 0x77);
    assert_eq!(kernel.state().device.registers.get(&CC), Some(&0), "and nothing is written");
    function.dma_revoke().unwrap();
    assert!(!reaches(&kernel, &mapping));
    drop(function);
    assert_eq!(kernel.state().left(), [""; 0]);
}

// ---- interrupts -------------------------------------------------------------------------------------------

#[test]
fn vectors_are_attached_in_any_order_replaced_and_detached() {
    let (function, kernel) = opened(Way::Group);
    let eventfd = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    assert_eq!(function.interrupts_max(), 65);
    function.interrupt_detach(3).unwrap();
    for vector in [3, 0, 64, 3] {
        function.interrupt_attach(vector, eventfd().as_fd()).unwrap();
    }
    let attached: Vec<_> = kernel.state().device.eventfds.keys().copied().collect();
    assert_eq!(attached, [(2, 0), (2, 3), (2, 64), (4, 0)]);
    function.interrupt_detach(3).unwrap();
    assert!(!kernel.state().device.eventfds.contains_key(&(2, 3)));
    for vector in [65, u16::MAX] {
        let error = function.interrupt_attach(vector, eventfd().as_fd()).unwrap_err();
        assert!(matches!(error, AccessError::NoSuch { .. }), "{error}");
        assert!(matches!(function.interrupt_detach(vector), Err(AccessError::NoSuch { .. })));
    }
}

#[test]
fn fewer_vectors_than_the_device_has_are_used_as_far_as_they_go() {
    let (tree, kernel) = host(Way::Group);
    kernel.state().host.vectors_left = 9;
    let function = open_by(Way::Group, &tree, &kernel).unwrap();
    let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    function.interrupt_attach(8, eventfd.as_fd()).unwrap();
    assert_eq!(kernel.state().device.vectors_on, 9);
    assert!(matches!(function.interrupt_attach(9, eventfd.as_fd()), Err(AccessError::NoSuch { .. })));
    kernel.state().host.vectors_left = 0;
    let (tree, other) = host(Way::Group);
    other.state().host.vectors_left = 0;
    let function = open_by(Way::Group, &tree, &other).unwrap();
    assert!(function.interrupt_attach(0, eventfd.as_fd()).is_err());
}
