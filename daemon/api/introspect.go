package api

// Introspection data (D-Bus specification, "Introspection Data Format").
const (
	introspectHead = `<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<node>
`
	introspectStandard = `  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId"><arg name="uuid" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/>
      <arg name="name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"/>
      <arg name="name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface" type="s"/>
      <arg name="changed" type="a{sv}"/>
      <arg name="invalidated" type="as"/>
    </signal>
  </interface>
`
	introspectManager = `  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{oa{sa{sv}}}" direction="out"/>
    </method>
    <signal name="InterfacesAdded">
      <arg name="object" type="o"/>
      <arg name="interfaces" type="a{sa{sv}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
  </interface>
  <interface name="org.memlinux.Memlinux1.Manager">
    <method name="Build">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="Plan">
      <arg name="device" type="o" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="plan" type="a{sv}" direction="out"/>
    </method>
    <method name="Write">
      <arg name="device" type="o" direction="in"/>
      <arg name="token" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="CheckCapacity">
      <arg name="device" type="o" direction="in"/>
      <arg name="token" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="WriteFile">
      <arg name="file" type="h" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="Verify">
      <arg name="device" type="o" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="VerifyFile">
      <arg name="file" type="h" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="StartVM">
      <arg name="console" type="h" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="InstallEntry">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="RemoveEntry">
      <arg name="id" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="SetNextBoot">
      <arg name="id" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="Rollback">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="job" type="o" direction="out"/>
    </method>
    <method name="BootMenu">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="menu" type="a{sv}" direction="out"/>
    </method>
    <method name="Doctor">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="checks" type="aa{sv}" direction="out"/>
    </method>
    <method name="Devices">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="devices" type="ao" direction="out"/>
    </method>
    <method name="Jobs">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="jobs" type="ao" direction="out"/>
    </method>
    <property name="Version" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
  </interface>
`
	introspectJob = `  <interface name="org.memlinux.Memlinux1.Job">
    <method name="Cancel">
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <signal name="Completed">
      <arg name="success" type="b"/>
      <arg name="message" type="s"/>
      <arg name="result" type="a{sv}"/>
    </signal>
    <property name="Id" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <property name="Kind" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <property name="Owner" type="u" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <property name="Cancelable" type="b" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <property name="State" type="s" access="read"/>
    <property name="Phase" type="s" access="read"/>
    <property name="Progress" type="d" access="read"/>
    <property name="Bytes" type="t" access="read"/>
    <property name="Total" type="t" access="read"/>
    <property name="Rate" type="t" access="read"/>
    <property name="Unit" type="s" access="read"/>
    <property name="Message" type="s" access="read"/>
    <property name="Result" type="a{sv}" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="invalidates"/>
    </property>
  </interface>
`
	introspectDevice = `  <interface name="org.memlinux.Memlinux1.Device">
    <property name="Name" type="s" access="read"/>
    <property name="Path" type="s" access="read"/>
    <property name="Size" type="t" access="read"/>
    <property name="SectorSize" type="u" access="read"/>
    <property name="Vendor" type="s" access="read"/>
    <property name="Model" type="s" access="read"/>
    <property name="Serial" type="s" access="read"/>
    <property name="Transport" type="s" access="read"/>
    <property name="Removable" type="b" access="read"/>
    <property name="ReadOnly" type="b" access="read"/>
    <property name="Contents" type="a(stss)" access="read"/>
    <property name="Refused" type="a(ssb)" access="read"/>
    <property name="Interrupted" type="s" access="read"/>
  </interface>
`
	introspectEntry = `  <interface name="org.memlinux.Memlinux1.BootEntry">
    <property name="Id" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <property name="Title" type="s" access="read"/>
    <property name="Cmdline" type="s" access="read"/>
    <property name="Default" type="b" access="read"/>
    <property name="Next" type="b" access="read"/>
  </interface>
`
	introspectTail = "</node>\n"
)

// Introspect is the introspection XML of an object that has the interface
// iface (one of the four of memlinux, or "" for a mere node), with the given
// child nodes.
func Introspect(iface string, children []string) string {
	s := introspectHead + introspectStandard
	switch iface {
	case ManagerInterface:
		s += introspectManager
	case JobInterface:
		s += introspectJob
	case DeviceInterface:
		s += introspectDevice
	case EntryInterface:
		s += introspectEntry
	}
	for _, c := range children {
		s += `  <node name="` + c + "\"/>\n"
	}
	return s + introspectTail
}
