// Package config reads memlinuxd's configuration: /etc/memlinux/memlinux.toml,
// then the environment (MEMLINUX_CACHE_DIR for cache-dir, and so on), which
// wins. Every key is optional; one that is not known is an error.
package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/spf13/viper"

	"github.com/memlinux/memlinux/daemon/api/recipe"
)

// DefaultPath is the file that is read where no other is named. It need not
// exist.
const DefaultPath = "/etc/memlinux/memlinux.toml"

// Config is how memlinuxd works on this machine.
type Config struct {
	CacheDir     string        `mapstructure:"cache-dir"`     // kernels and generated systems; may be emptied while no job runs
	CacheLimit   int           `mapstructure:"cache-limit"`   // MiB of kernels and systems that the cache keeps between jobs; what was used longest ago goes first
	StateDir     string        `mapstructure:"state-dir"`     // jobs, console logs and screenshots
	Kernel       string        `mapstructure:"kernel"`        // where a client names none: auto or debian:PACKAGE
	Memory       int           `mapstructure:"memory"`        // MiB of vm's machine where a client names none, and the least of install's test
	JobRetention time.Duration `mapstructure:"job-retention"` // how long an ended job can be asked for
	IdleExit     time.Duration `mapstructure:"idle-exit"`     // how long a service of systemd stays when it has nothing to do; 0: for ever
}

var defaults = map[string]any{
	"cache-dir":     "/var/cache/memlinux",
	"cache-limit":   20 << 10,
	"state-dir":     "/var/lib/memlinux",
	"kernel":        "auto",
	"memory":        512,
	"job-retention": 15 * time.Minute,
	"idle-exit":     time.Minute,
}

// Load reads the file at path. Only the default file may be missing.
func Load(path string) (Config, error) {
	v := viper.New()
	v.SetConfigFile(path)
	v.SetConfigType("toml")
	v.SetEnvPrefix("MEMLINUX")
	v.SetEnvKeyReplacer(strings.NewReplacer("-", "_"))
	for key, value := range defaults {
		v.SetDefault(key, value)
		// AutomaticEnv is not seen by Unmarshal, so each key is bound.
		if err := v.BindEnv(key); err != nil {
			return Config{}, fmt.Errorf("configuration: %w", err)
		}
	}
	if err := v.ReadInConfig(); err != nil && (path != DefaultPath || !errors.Is(err, os.ErrNotExist)) {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	for _, key := range v.AllKeys() {
		if _, ok := defaults[key]; !ok {
			return Config{}, fmt.Errorf("configuration %s: unknown key %q; known are %s", path, key, strings.Join(Keys(), ", "))
		}
	}
	var c Config
	if err := v.UnmarshalExact(&c); err != nil {
		return Config{}, wrongType(v, path, err)
	}
	return c, c.check(path)
}

// wrongType says which key has a value that is not of its type: viper's own
// words name neither the file nor what would be right.
func wrongType(v *viper.Viper, path string, err error) error {
	t := reflect.TypeFor[Config]()
	for i, key := range Keys() {
		if v.UnmarshalKey(key, reflect.New(t.Field(i).Type).Interface()) == nil {
			continue
		}
		want := "must be a text"
		switch t.Field(i).Type {
		case reflect.TypeFor[int]():
			want = "must be a whole number"
		case reflect.TypeFor[time.Duration]():
			want = `must be a time like "15m"`
		}
		return bad(path, key, fmt.Sprintf("is %q; it %s", fmt.Sprint(v.Get(key)), want))
	}
	return fmt.Errorf("configuration %s: %w", path, err)
}

// bad says what is wrong with a key, and where it was set.
func bad(path, key, why string) error {
	if variable := "MEMLINUX_" + strings.ToUpper(strings.ReplaceAll(key, "-", "_")); os.Getenv(variable) != "" {
		return fmt.Errorf("configuration: %s in the environment %s", variable, why)
	}
	return fmt.Errorf("configuration %s: %s %s", path, key, why)
}

// Keys lists the known keys.
func Keys() []string {
	var keys []string
	t := reflect.TypeFor[Config]()
	for i := range t.NumField() {
		keys = append(keys, t.Field(i).Tag.Get("mapstructure"))
	}
	return keys
}

func (c Config) check(path string) error {
	bad := func(key, why string) error { return bad(path, key, why) }
	var kernel recipe.KernelSource
	err := kernel.UnmarshalText([]byte(c.Kernel))
	switch {
	case !filepath.IsAbs(c.CacheDir):
		return bad("cache-dir", "must be an absolute path")
	case !filepath.IsAbs(c.StateDir):
		return bad("state-dir", "must be an absolute path")
	case c.CacheLimit < 0 || c.CacheLimit > 1<<30:
		return bad("cache-limit", "must be 0 to 1073741824 (MiB)")
	case err != nil || kernel.Kind != recipe.KindAuto && kernel.Kind != recipe.KindDebian:
		return bad("kernel", "must be auto or debian:PACKAGE")
	case c.Memory < 64 || c.Memory > 1<<20:
		return bad("memory", "must be 64 to 1048576 (MiB)")
	case c.JobRetention < time.Minute:
		return bad("job-retention", "must be at least 1m")
	case c.IdleExit < 0:
		return bad("idle-exit", "must not be negative; 0s is for ever")
	}
	return nil
}
