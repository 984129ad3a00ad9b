-- What the server's sandbox offers to a script, and no more.
std = "lua51"
read_globals = { "redis", "KEYS", "ARGV", "cjson", "cmsgpack", "struct", "bit" }
not_globals = { "debug", "dofile", "io", "loadfile", "module", "os", "package", "print", "require" }
max_line_length = 100

-- A script is sent with its includes put in: what they define at their top is defined in it.
local folder = "celery_coalesce/store/lua/"

local function defined_in(library)
  local names = {}
  for line in io.lines(folder .. "lib/" .. library .. ".lua") do
    local list = line:match("^local function ([%w_]+)") or line:match("^local ([%w_, ]+)") or ""
    for name in list:gmatch("[%w_]+") do names[#names + 1] = name end
  end
  return names
end

for file in require("lfs").dir(folder) do
  if file:match("%.lua$") then
    local included = {}
    for line in io.lines(folder .. file) do
      local library = line:match("^%-%-# include ([%w_]+)$")
      for _, name in ipairs(library and defined_in(library) or {}) do included[#included + 1] = name end
    end
    files[folder .. file] = { read_globals = included }
  end
end

-- Whoever includes accept has included record before it; neither can know who uses what it defines.
files[folder .. "lib/*.lua"] = { ignore = { "211" } }
files[folder .. "lib/accept.lua"] = { read_globals = defined_in("record") }
