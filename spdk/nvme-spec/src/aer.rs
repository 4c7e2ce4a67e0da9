//! Asynchronous events (Base section 5.1.2).

open_enum! {
    /// Asynchronous Event Type, DW0 bits 2:0.
    pub struct AsyncEventType(u8) {
        /// Error status.
        ERROR = 0,
        /// SMART / Health status.
        SMART = 1,
        /// Notice.
        NOTICE = 2,
        /// I/O Command Set specific.
        IO_COMMAND_SET = 6,
        /// Vendor specific.
        VENDOR = 7,
    }
}

open_enum! {
    /// Asynchronous Event Information for [`AsyncEventType::NOTICE`], DW0 bits 15:8.
    pub struct NoticeEvent(u8) {
        /// Attached Namespace Attribute Changed.
        NAMESPACE_ATTRIBUTE_CHANGED = 0x00,
        /// Firmware Activation Starting.
        FIRMWARE_ACTIVATION_STARTING = 0x01,
        /// Telemetry Log Changed.
        TELEMETRY_LOG_CHANGED = 0x02,
        /// Asymmetric Namespace Access Change.
        ANA_CHANGE = 0x03,
        /// Predictable Latency Event Aggregate Log Change.
        PREDICTABLE_LATENCY_CHANGE = 0x04,
        /// Discovery Log Page Change.
        DISCOVERY_LOG_CHANGE = 0xF0,
    }
}

/// DW0 of the completion that reports an event: type, information and the log page that clears it.
#[must_use]
pub const fn event_dw0(event_type: AsyncEventType, information: u8, log_page: u8) -> u32 {
    event_type.0 as u32 | (information as u32) << 8 | (log_page as u32) << 16
}

/// Bits of the Asynchronous Event Configuration feature and of OAES (Base sections 5.1.25.1.5 and 5.1.13.2.1).
pub mod config {
    /// Attached Namespace Attribute Notices.
    pub const NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
    /// Firmware Activation Notices.
    pub const FIRMWARE_ACTIVATION: u32 = 1 << 9;
    /// Asymmetric Namespace Access Change Notices.
    pub const ANA_CHANGE: u32 = 1 << 11;
    /// Discovery Log Page Change Notification.
    pub const DISCOVERY_LOG_CHANGE: u32 = 1 << 31;
    /// SMART / Health critical warnings; in the feature only.
    pub const SMART_CRITICAL: u32 = 0xFF;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_change_is_what_linux_expects() {
        let dw0 = event_dw0(AsyncEventType::NOTICE, NoticeEvent::NAMESPACE_ATTRIBUTE_CHANGED.0, 0x04);
        assert_eq!(dw0, 0x0004_0002);
    }
}
